"""What apply_cos_sin returns for the caller's tables, with and without positions."""

from typing import Any

import pytest
import reference
import torch
import torch_rope
from hypothesis import given
from reference import assert_rotated, assert_same_bits, random_positions, random_values
from strategies import FLOAT_DTYPES, INDEX_DTYPES, TableApplication, table_applications
from torch import Tensor


def tables(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Draws two tables, which need not be the cosine and sine of anything."""
    return random_values(shape, dtype, device, seed=1), random_values(shape, dtype, device, seed=2)


def check(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, **options: Any
) -> None:
    """Compares ``apply_cos_sin`` with the reference."""
    actual = torch_rope.apply_cos_sin(x, cos, sin, positions, **options)
    assert actual.dtype == x.dtype
    assert_rotated(actual, reference.apply_cos_sin(x, cos, sin, positions, **options))


@given(application=table_applications())
def test_any_call_matches_the_reference(device: str, application: TableApplication) -> None:
    check(*application.tensors(device), **application.options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("tables_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_tables_of_every_dtype_rotate_every_dtype(
    device: str,
    dtype: torch.dtype,
    tables_dtype: torch.dtype,
    by_position: bool,
    interleaved: bool,
) -> None:
    x = random_values((2, 13, 3, 66), dtype, device)
    cos, sin = tables((13, 33), tables_dtype, device)
    if by_position:
        check(
            x, cos, sin, torch.arange(12, -1, -1, device=device)[:, None], interleaved=interleaved
        )
    else:
        check(x, cos[:, None], sin[:, None], interleaved=interleaved)


@pytest.mark.parametrize(
    "shape", [(8,), (1, 8), (7, 1, 8), (2, 7, 1, 8), (2, 7, 5, 8), (2, 1, 1, 8)], ids=str
)
def test_tables_broadcast_with_the_tokens(device: str, shape: tuple[int, ...]) -> None:
    check(random_values((2, 7, 5, 16), device=device), *tables(shape, device=device))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_tables_broadcast_with_the_shape_without_the_embedding_axis(device: str, axis: int) -> None:
    x = random_values((4, 6, 8), device=device)
    tokens = [size for dim, size in enumerate(x.shape) if dim != axis % 3]
    cos, sin = tables((*tokens, 2), device=device)
    check(x, cos, sin, embedding_axis=axis)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", [(7, 1), (2, 7, 1), (2, 7, 5), (5,), ()], ids=str)
def test_positions_pick_rows_of_the_tables(
    device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = random_values((2, 7, 5, 16), device=device)
    positions = random_positions(shape, dtype, device, low=0, high=100)
    check(x, *tables((100, 8), device=device), positions)


def test_the_first_and_the_last_row_can_be_picked(device: str) -> None:
    x = random_values((2, 16), device=device)
    check(x, *tables((100, 8), device=device), torch.tensor([0, 99], device=device))


def test_positions_of_any_strides_pick_rows(device: str) -> None:
    x = random_values((4, 9, 3, 16), device=device)
    cos, sin = tables((50, 8), device=device)
    rows = random_positions((3, 18, 4), low=0, high=50, device=device)
    check(x, cos, sin, rows.permute(2, 1, 0)[:, ::2])
    check(x, cos, sin, rows[0, :9, :1].expand(4, 9, 3))


def test_tables_can_have_any_strides(device: str) -> None:
    x = random_values((9, 16), device=device)
    cos, sin = tables((8, 18), device=device)
    check(x, cos.t()[::2], sin.t()[::2])
    check(x, cos.t()[::2], sin.t()[::2].contiguous())
    check(x, cos.t(), sin.t(), torch.arange(0, 18, 2, device=device))
    check(x, cos[:1, :1].expand(9, 8), sin[:1, :1].expand(9, 8))
    check(x, cos[:1, :1].expand(9, 8), sin[:1, :1].expand(9, 8), torch.arange(9, device=device))


def test_the_halves_of_doubled_tables_can_be_used_in_place(device: str) -> None:
    x = random_values((2, 9, 3, 16), device=device)
    cos, sin = tables((9, 1, 16), device=device)
    check(x, cos[..., :8], sin[..., :8])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3, 24])
def test_only_the_columns_of_the_tables_are_rotated(
    device: str, offset: int, interleaved: bool
) -> None:
    x = random_values((9, 40), device=device)
    check(x, *tables((9, 8), device=device), rotary_offset=offset, interleaved=interleaved)


def test_tables_without_columns_change_nothing(device: str) -> None:
    x = random_values((9, 40), device=device)
    assert_same_bits(torch_rope.apply_cos_sin(x, *tables((9, 0), device=device)), x)


def test_conjugate_takes_the_sine_negative(device: str) -> None:
    x = random_values((9, 16), device=device)
    cos, sin = tables((9, 8), device=device)
    conjugated = torch_rope.apply_cos_sin(x, cos, sin, conjugate=True)
    assert_rotated(conjugated, reference.apply_cos_sin(x, cos, -sin))


def test_tables_are_not_modified(device: str) -> None:
    x = random_values((9, 16), torch.bfloat16, device)
    cos, sin = tables((9, 8), torch.float64, device)
    before = cos.clone(), sin.clone()
    torch_rope.apply_cos_sin_(x, cos, sin)
    assert_same_bits(cos, before[0])
    assert_same_bits(sin, before[1])


def test_an_empty_tensor_needs_no_row(device: str) -> None:
    x = random_values((0, 16), device=device)
    check(x, *tables((0, 8), device=device), torch.empty(0, dtype=torch.int64, device=device))


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("row", [10, 11, -1, -10, 2**31 - 1, -(2**31)])
def test_a_row_out_of_range_is_an_index_error(row: int, dtype: torch.dtype) -> None:
    x = random_values((3, 16))
    positions = torch.tensor([0, row, 9], dtype=dtype)
    with pytest.raises(
        IndexError, match=r"^rope::apply_cos_sin\(\): expected positions to .*but got"
    ):
        torch_rope.apply_cos_sin(x, *tables((10, 8)), positions)


@pytest.mark.parametrize("row", [2**32, 2**32 + 3, -(2**32), 2**63 - 1, -(2**63)])
def test_a_row_out_of_range_of_int32_is_an_index_error(row: int) -> None:
    with pytest.raises(IndexError, match="expected positions to"):
        torch_rope.apply_cos_sin(random_values((16,)), *tables((10, 8)), torch.tensor(row))


def test_a_table_without_rows_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="expected positions to"):
        torch_rope.apply_cos_sin(
            random_values((3, 16)), *tables((0, 8)), torch.zeros(3, dtype=torch.int32)
        )


@pytest.mark.parametrize("place", [0, 50_000, 99_999])
def test_one_row_out_of_range_among_many_tokens_leaves_x_as_it_was(place: int) -> None:
    x = random_values((100_000, 16))
    before = x.clone()
    positions = torch.arange(100_000) % 10
    positions[place] = 10
    with pytest.raises(IndexError, match="expected positions to"):
        torch_rope.apply_cos_sin_(x, *tables((10, 8)), positions)
    assert_same_bits(x, before)


def test_one_row_out_of_range_leaves_q_and_k_as_they_were() -> None:
    q, k = random_values((1000, 4, 16)), random_values((1000, 2, 16), seed=3)
    before = q.clone(), k.clone()
    positions = torch.arange(1000)[:, None] % 10
    positions[-1] = -1
    with pytest.raises(IndexError, match=r"^rope::apply_cos_sin_qk_\(\): expected positions to"):
        torch_rope.apply_cos_sin_((q, k), *tables((10, 8)), positions)
    assert_same_bits(q, before[0])
    assert_same_bits(k, before[1])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_nan_of_any_payload_in_a_table_stays_a_nan(device: str, dtype: torch.dtype) -> None:
    table = torch.full((32,), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
    x = torch.ones(3, 64, dtype=dtype, device=device)
    assert torch_rope.apply_cos_sin(x, table, table).isnan().all()
    position = torch.full((), -1, dtype=torch.int64, device=device).view(torch.float64)
    assert torch_rope.apply(x, position).isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("tables_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_full_width_tables_have_an_angle_for_each_element(
    device: str,
    dtype: torch.dtype,
    tables_dtype: torch.dtype,
    by_position: bool,
    conjugate: bool,
    interleaved: bool,
) -> None:
    options = {"interleaved": interleaved, "conjugate": conjugate, "full_width": True}
    for pairs in (33, 64, 3):
        x = random_values((2, 13, 3, 2 * pairs + 5), dtype, device)
        cos, sin = tables((13, 2 * pairs), tables_dtype, device)
        if by_position:
            rows = torch.arange(12, -1, -1, device=device)[:, None]
            check(x, cos, sin, rows, rotary_offset=2, rotary_dim=2 * pairs, **options)
        else:
            check(x, cos[:, None], sin[:, None], rotary_offset=2, **options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("pairs", [1, 3, 8, 20, 40, 64])
def test_full_width_tables_with_equal_angles_give_the_bits_of_half_width_ones(
    device: str, pairs: int, dtype: torch.dtype, interleaved: bool
) -> None:
    x = random_values((2, 7, 3, 2 * pairs), dtype, device)
    cos, sin = tables((7, 1, pairs), dtype, device)
    options = {"interleaved": interleaved}

    def full(table: Tensor) -> Tensor:
        return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)

    expected = torch_rope.apply_cos_sin(x, cos, sin, **options)
    actual = torch_rope.apply_cos_sin(x, full(cos), full(sin), full_width=True, **options)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
def test_full_width_gives_the_same_bits_for_every_layout_and_form(
    device: str, conjugate: bool, interleaved: bool
) -> None:
    options = {"interleaved": interleaved, "conjugate": conjugate, "full_width": True}
    q = random_values((2, 4, 9, 40), torch.bfloat16, device)
    k = random_values((2, 4, 9, 48), torch.float32, device, seed=5)
    cos, sin = tables((9, 40), device=device)
    expected = [torch_rope.apply_cos_sin(x, cos, sin, **options) for x in (q, k)]
    pairs = [
        torch_rope.apply_cos_sin((q, k), cos, sin, **options),
        torch_rope.apply_cos_sin_((q.clone(), k.clone()), cos, sin, **options),
        torch_rope.apply_cos_sin(
            (q.transpose(0, 3).contiguous().transpose(0, 3), k), cos, sin, **options
        ),
        torch_rope.apply_cos_sin(
            (q, k),
            *(t.t().contiguous().t() for t in (cos, sin)),
            torch.arange(9, device=device),
            **options,
        ),
    ]
    for pair in pairs:
        for actual, one in zip(pair, expected, strict=True):
            assert_same_bits(actual, one)
    for token in (0, 8):
        alone = torch_rope.apply_cos_sin(q[:, :, token], cos[token], sin[token], **options)
        assert_same_bits(alone, expected[0][:, :, token])


def test_conjugate_is_the_transpose_for_full_width_tables(device: str) -> None:
    x, y = (random_values((9, 16), torch.float64, device, seed=seed) for seed in (0, 3))
    cos, sin = tables((9, 12), torch.float64, device)
    options = {"full_width": True, "rotary_offset": 3}
    forward = torch_rope.apply_cos_sin(x, cos, sin, **options)
    backward = torch_rope.apply_cos_sin(y, cos, sin, conjugate=True, **options)
    torch.testing.assert_close((forward * y).sum(), (x * backward).sum())


def test_full_width_is_what_hugging_face_models_compute(device: str) -> None:
    x = random_values((2, 4, 9, 16), torch.float64, device)
    cos, sin = tables((9, 16), torch.float64, device)  # whose halves differ
    rotated_half = torch.cat((-x[..., 8:], x[..., :8]), dim=-1)
    actual = torch_rope.apply_cos_sin(x, cos, sin, full_width=True)
    torch.testing.assert_close(actual, x * cos + rotated_half * sin)


@pytest.mark.parametrize("full_width", [False, True])
def test_rotary_dim_is_what_follows_from_the_width(device: str, full_width: bool) -> None:
    x = random_values((9, 40), device=device)
    cos, sin = tables((9, 16), device=device)
    width = 16 if full_width else 32
    check(x, cos, sin, rotary_dim=width, full_width=full_width)
    empty = tables((9, 0), device=device)
    assert_same_bits(torch_rope.apply_cos_sin(x, *empty, rotary_dim=0, full_width=full_width), x)


def test_a_row_out_of_range_of_full_width_tables_leaves_x_as_it_was() -> None:
    x = random_values((3, 16))
    before = x.clone()
    with pytest.raises(IndexError, match="expected positions to"):
        torch_rope.apply_cos_sin_(x, *tables((10, 16)), torch.tensor([0, 9, 10]), full_width=True)
    assert_same_bits(x, before)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_nan_of_any_payload_in_a_full_width_table_stays_a_nan(
    device: str, dtype: torch.dtype
) -> None:
    table = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
    x = torch.ones(3, 64, dtype=dtype, device=device)
    assert torch_rope.apply_cos_sin(x, table, table, full_width=True).isnan().all()
