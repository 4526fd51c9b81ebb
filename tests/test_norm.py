"""norm_apply and norm_apply_cos_sin: the formula, and what each argument means."""

from typing import Any

import pytest
import reference
import torch
import torch_rope
from hypothesis import given
from hypothesis import strategies as st
from observe import OperatorsSeen
from reference import (
    Expected,
    assert_rotated,
    assert_same_bits,
    half_ulp,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    INV_FREQ_DTYPES,
    POSITION_DTYPES,
    Normalization,
    layouts,
    normalizations,
)
from torch import Tensor
from torch.nn.functional import rms_norm


def check(x: Tensor, weight: Tensor | None, *angles: Tensor | None, **options: Any) -> None:
    """Compares ``norm_apply`` with the reference."""
    actual = torch_rope.norm_apply(x, weight, *angles, **options)
    assert actual.dtype == x.dtype
    assert actual.device == x.device
    assert actual.stride() == torch.empty_like(x).stride()
    assert_rotated(actual, reference.norm_apply(x, weight, *angles, **options))


def check_cos_sin(x: Tensor, weight: Tensor | None, *angles: Tensor | None, **options: Any) -> None:
    """Compares ``norm_apply_cos_sin`` with the reference."""
    actual = torch_rope.norm_apply_cos_sin(x, weight, *angles, **options)
    assert actual.dtype == x.dtype
    assert_rotated(actual, reference.norm_apply_cos_sin(x, weight, *angles, **options))


def tokens(device: str, count: int = 9) -> Tensor:
    """Returns positions of shape (count, 1), for x of shape (B, S, H, D)."""
    return random_positions((count, 1), device=device)


# --------------------------------------------------------------------------------------------------
# Any call


@given(call=normalizations())
def test_any_call_matches_the_reference(device: str, call: Normalization) -> None:
    check(*call.tensors(device), **call.options)


@given(call=normalizations(tables=True))
def test_any_call_with_tables_matches_the_reference(device: str, call: Normalization) -> None:
    check_cos_sin(*call.tensors(device), **call.options)


FORMS = pytest.mark.parametrize("tables", [False, True], ids=["positions", "tables"])


def functions(tables: bool) -> tuple[Any, Any, Any]:
    """Returns the function, the same in place, and its decomposition."""
    name = "norm_apply_cos_sin" if tables else "norm_apply"
    return (
        getattr(torch_rope, name),
        getattr(torch_rope, f"{name}_"),
        getattr(torch.ops.rope, f"{name}_composed"),
    )


@FORMS
@given(data=st.data())
def test_any_decomposed_call_matches_the_reference(
    device: str, tables: bool, data: st.DataObject
) -> None:
    call: Normalization = data.draw(normalizations(tables=tables))
    arguments = call.tensors(device)
    expected = (reference.norm_apply_cos_sin if tables else reference.norm_apply)(
        *arguments, **call.options
    )
    assert_rotated(functions(tables)[2](*arguments, **call.options), expected)


@FORMS
@given(data=st.data())
def test_any_call_changes_none_of_its_arguments(
    device: str, tables: bool, data: st.DataObject
) -> None:
    call: Normalization = data.draw(normalizations(tables=tables))
    arguments = call.tensors(device)
    before = [None if tensor is None else tensor.clone() for tensor in arguments]
    functions(tables)[0](*arguments, **call.options)
    for tensor, copy in zip(arguments, before, strict=True):
        if tensor is not None:
            assert torch.equal(tensor, copy)


@FORMS
@given(data=st.data())
def test_any_call_in_place_gives_the_bits_of_the_functional_form(
    device: str, tables: bool, data: st.DataObject
) -> None:
    call: Normalization = data.draw(normalizations(expanded=False, tables=tables))
    x, *others = call.tensors(device)
    function, in_place, _ = functions(tables)
    expected = function(x, *others, **call.options)
    assert in_place(x, *others, **call.options) is x
    assert_same_bits(x, expected)


@FORMS
@given(data=st.data())
def test_memory_around_x_is_untouched(device: str, tables: bool, data: st.DataObject) -> None:
    call: Normalization = data.draw(normalizations(expanded=False, tables=tables))
    x, *others = call.tensors(device)
    layout = call.x.layout
    buffer = random_values((layout.span,), x.dtype, device)
    before = reference.bits(buffer)
    functions(tables)[1](layout.of(buffer), *others, **call.options)
    around = torch.ones(layout.span, dtype=torch.bool)
    around[layout.addresses()] = False
    assert torch.equal(reference.bits(buffer)[around], before[around])


@FORMS
@given(data=st.data())
def test_any_pair_gives_the_bits_of_two_singles(
    device: str, tables: bool, data: st.DataObject
) -> None:
    call: Normalization = data.draw(normalizations(tables=tables))
    q, q_weight, *angles = call.tensors(device)
    k_layout = data.draw(layouts(q.shape, expanded=True))
    k = k_layout.values(data.draw(st.sampled_from(FLOAT_DTYPES)), device, seed=7)
    k_weight = data.draw(st.sampled_from((None, q_weight)))
    if k_weight is not None:
        k_weight = (k_weight * 0.5).to(data.draw(st.sampled_from(FLOAT_DTYPES)))
    function = functions(tables)[0]
    pair = function((q, k), (q_weight, k_weight), *angles, **call.options)
    for actual, x, weight in zip(pair, (q, k), (q_weight, k_weight), strict=True):
        assert_same_bits(actual, function(x, weight, *angles, **call.options))


@FORMS
@given(data=st.data())
def test_meta_tensors_give_the_strides_of_empty_like(tables: bool, data: st.DataObject) -> None:
    call: Normalization = data.draw(normalizations(tables=tables))
    x, *others = call.tensors("cpu")
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    others = [None if tensor is None else tensor.to("meta") for tensor in others]
    actual = functions(tables)[0](meta, *others, **call.options)
    expected = torch.empty_like(meta)
    assert actual.device.type == "meta"
    assert (actual.dtype, actual.shape, actual.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )


# --------------------------------------------------------------------------------------------------
# x and its dtypes


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES)
def test_every_dtype_is_normalized(
    device: str,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    interleaved: bool,
    norm_last: bool,
) -> None:
    x = random_values((2, 9, 3, 128), dtype, device)
    weight = random_values((128,), weight_dtype, device, seed=1)
    check(x, weight, tokens(device), interleaved=interleaved, norm_last=norm_last)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    "size", [2, 4, 6, 10, 14, 16, 30, 32, 34, 62, 66, 80, 96, 100, 128, 130, 192, 256, 600]
)
def test_any_size_is_normalized(
    device: str, size: int, dtype: torch.dtype, interleaved: bool
) -> None:
    x = random_values((5, 3, size), dtype, device)
    weight = random_values((size,), dtype, device, seed=1)
    positions = random_positions((5, 1), device=device)
    check(x, weight, positions, interleaved=interleaved)
    check(x, None, positions, interleaved=interleaved, norm_last=True)


@pytest.mark.parametrize("shape", [(10,), (0,), (3, 0), (0, 8), (2, 0, 3, 8)], ids=str)
def test_vectors_and_empty_tensors_are_normalized(device: str, shape: tuple[int, ...]) -> None:
    x = random_values(shape, device=device)
    check(x, random_values(shape[-1:], device=device), torch.tensor(5, device=device))


@pytest.mark.parametrize("norm_last", [False, True])
def test_more_dimensions_than_a_launch_has_are_normalized(device: str, norm_last: bool) -> None:
    sizes = (2,) * 14
    # In memory the dimensions of x are in the opposite order of those of the others.
    x = random_values((*sizes, 4), device=device).permute(*reversed(range(14)), 14)
    positions = random_positions(sizes, device=device)
    weight = random_values((*sizes, 4), device=device, seed=1)
    axes = (-1, 3, 5)
    actual = torch_rope.norm_apply(x, weight, positions, norm_axes=axes, norm_last=norm_last)
    expected = torch_rope.norm_apply(
        x.contiguous(), weight, positions, norm_axes=axes, norm_last=norm_last
    )
    assert_same_bits(actual, expected)
    assert_rotated(
        actual,
        reference.norm_apply(x, weight, positions, norm_axes=axes, norm_last=norm_last),
    )
    torch_rope.norm_apply_(x, weight, positions, norm_axes=axes, norm_last=norm_last)
    assert_same_bits(x, actual)


# --------------------------------------------------------------------------------------------------
# What is rotated after or before the norm


@pytest.mark.parametrize("dtype", POSITION_DTYPES)
@pytest.mark.parametrize("shape", [(9, 1), (2, 9, 1), (2, 9, 3), ()], ids=str)
def test_positions_of_every_kind(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random_values((2, 9, 3, 64), device=device), random_values((64,), device=device)
    check(x, weight, random_positions(shape, dtype, device))


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("dtype", INV_FREQ_DTYPES)
@pytest.mark.parametrize("axes", [None, 1, 3])
def test_frequencies_can_be_given(
    device: str, axes: int | None, dtype: torch.dtype, norm_last: bool
) -> None:
    leading = () if axes is None else (axes,)
    x, weight = random_values((2, 9, 3, 64), device=device), random_values((64,), device=device)
    positions = random_positions((*leading, 9, 1), device=device)
    inv_freq = random_inv_freq((*leading, 24), dtype, device)
    check(x, weight, positions, inv_freq, norm_last=norm_last, rotary_offset=5)


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize("dtype", [None, *INDEX_DTYPES])
def test_tables_of_every_kind(
    device: str, dtype: torch.dtype | None, full_width: bool, norm_last: bool, conjugate: bool
) -> None:
    x, weight = random_values((2, 9, 3, 40), device=device), random_values((40,), device=device)
    angles = random_values((9, 1, 16), torch.float64, device, seed=1)
    cos, sin = angles.cos(), angles.sin()
    if full_width:
        cos, sin = torch.cat((cos, sin), -1), torch.cat((sin, cos), -1)
    rows = None
    if dtype is not None:
        cos, sin = cos[:, 0], sin[:, 0]
        rows = random_positions((9, 1), dtype, device, low=0, high=9)
    check_cos_sin(
        x,
        weight,
        cos,
        sin,
        rows,
        full_width=full_width,
        norm_last=norm_last,
        conjugate=conjugate,
        rotary_offset=3,
    )


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("offset", "rotary_dim"), [(0, 6), (0, 32), (1, 6), (5, 30), (4, None), (34, 6), (38, 2)]
)
def test_elements_outside_the_slice_are_normalized_and_not_rotated(
    device: str, offset: int, rotary_dim: int | None, interleaved: bool, norm_last: bool
) -> None:
    x, weight = random_values((3, 5, 40), device=device), random_values((40,), device=device)
    options = {
        "rotary_dim": rotary_dim,
        "rotary_offset": offset,
        "interleaved": interleaved,
        "norm_last": norm_last,
    }
    positions = random_positions((5,), device=device)
    check(x, weight, positions, **options)
    actual = torch_rope.norm_apply(x, weight, positions, **options)
    unrotated = torch_rope.norm_apply(x, weight, positions, rotary_dim=0)
    end = 40 if rotary_dim is None else offset + rotary_dim
    outside = [*range(offset), *range(end, 40)]
    torch.testing.assert_close(actual[..., outside], unrotated[..., outside])


def test_attention_factor_multiplies_what_is_rotated_and_not_what_is_normalized_after(
    device: str,
) -> None:
    x, positions = random_values((9, 32), device=device), random_positions((9,), device=device)
    once = torch_rope.norm_apply(x, None, positions)
    twice = torch_rope.norm_apply(x, None, positions, attention_factor=2.0)
    torch.testing.assert_close(twice, 2 * once)
    after = torch_rope.norm_apply(x, None, positions, attention_factor=2.0, norm_last=True)
    torch.testing.assert_close(after, once, rtol=1e-4, atol=1e-5)


def test_conjugate_turns_what_was_normalized_back(device: str) -> None:
    x = random_values((9, 32), torch.float64, device)
    positions = random_positions((9,), device=device, low=-9, high=9)
    normalized = torch_rope.norm_apply(x, None, positions)
    back = torch_rope.apply(normalized, positions, conjugate=True)
    torch.testing.assert_close(back, rms_norm(x, (32,), eps=1e-6))
    conjugated = torch_rope.norm_apply(x, None, positions, conjugate=True)
    torch.testing.assert_close(conjugated, torch_rope.norm_apply(x, None, -positions))


# --------------------------------------------------------------------------------------------------
# The norm


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("positions", ["scalar", "float", "per head"])
def test_a_rotation_of_nothing_is_an_rms_norm(
    device: str, positions: str, dtype: torch.dtype
) -> None:
    x = random_values((2, 9, 3, 64), dtype, device)
    weight = random_values((64,), dtype, device, seed=1)
    given = {
        "scalar": torch.tensor(3, device=device),
        "float": torch.full((9, 1), float("nan"), device=device),
        "per head": random_positions((2, 9, 3), device=device),
    }[positions]
    actual = torch_rope.norm_apply(x, weight, given, rotary_dim=0, eps=1e-5)
    exact = rms_norm(x.double(), (64,), weight.double(), eps=1e-5)
    error = 1e-6 if dtype != torch.float64 else 1e-14
    allowed = error * exact.abs() + half_ulp(exact.abs() * (1 + error), dtype)
    assert ((actual.double() - exact).abs() <= allowed).all()


def test_a_rotation_by_tables_of_nothing_is_an_rms_norm(device: str) -> None:
    x, weight = random_values((3, 5, 7), device=device), random_values((7,), device=device)
    nothing = torch.empty(0, device=device)
    actual = torch_rope.norm_apply_cos_sin(x, weight, nothing, nothing)
    torch.testing.assert_close(actual, rms_norm(x, (7,), weight, eps=1e-6))


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 0.5, 100.0])
def test_eps_is_added_to_the_mean(device: str, eps: float, norm_last: bool) -> None:
    x, weight = random_values((9, 32), device=device), random_values((32,), device=device)
    check(x, weight, random_positions((9,), device=device), eps=eps, norm_last=norm_last)


def test_the_default_of_eps_is_1e_6(device: str) -> None:
    x, positions = 1e-3 * random_values((9, 32), device=device), torch.arange(9, device=device)
    assert_same_bits(
        torch_rope.norm_apply(x, None, positions),
        torch_rope.norm_apply(x, None, positions, eps=1e-6),
    )
    check(x, None, positions)


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0, -1.0, 0.1, 1e3])
def test_weight_offset_is_added_to_the_weight(device: str, offset: float, norm_last: bool) -> None:
    x, weight = random_values((9, 32), device=device), random_values((32,), device=device)
    positions = random_positions((9,), device=device)
    check(x, weight, positions, weight_offset=offset, norm_last=norm_last)


def test_weight_offset_is_added_in_the_computation_type(device: str) -> None:
    # In bfloat16, 1 + 2**-9 is 1.
    x = random_values((9, 32), device=device)
    weight = torch.full((32,), 2.0**-9, dtype=torch.bfloat16, device=device)
    positions = torch.arange(9, device=device)
    actual = torch_rope.norm_apply(x, weight, positions, weight_offset=1.0)
    expected = torch_rope.norm_apply(x, 1 + weight.float(), positions)
    assert_same_bits(actual, expected)


def test_without_a_weight_nothing_multiplies(device: str) -> None:
    x, positions = random_values((9, 32), device=device), torch.arange(9, device=device)
    plain = torch_rope.norm_apply(x, None, positions)
    assert_same_bits(torch_rope.norm_apply(x, None, positions, weight_offset=5.0), plain)
    ones = torch.ones(32, device=device)
    assert_same_bits(torch_rope.norm_apply(x, ones, positions), plain)


def test_nothing_is_rounded_between_the_norm_and_the_weight(device: str) -> None:
    x = random_values((64, 128), torch.bfloat16, device)
    weight = random_values((128,), torch.float32, device, seed=1)
    positions = random_positions((64,), device=device)
    # An element rounded in between would be off by up to twice what is allowed.
    check(x, weight, positions)
    check(x, weight, positions, norm_last=True)


@pytest.mark.parametrize(
    "shape",
    [(64,), (1, 64), (3, 64), (9, 1, 64), (2, 1, 3, 64), (2, 9, 3, 64), (1, 1, 1, 64)],
    ids=str,
)
@pytest.mark.parametrize("norm_last", [False, True])
def test_weights_broadcast_with_the_tokens(
    device: str, norm_last: bool, shape: tuple[int, ...]
) -> None:
    x, weight = random_values((2, 9, 3, 64), device=device), random_values(shape, device=device)
    check(x, weight, tokens(device), norm_last=norm_last)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_weights_end_with_the_embedding_axis_wherever_it_is(device: str, axis: int) -> None:
    x = random_values((4, 6, 8), device=device)
    others = [size for dim, size in enumerate(x.shape) if dim != axis % 3]
    for leading in ((), others[-1:], (1, others[1]), others):
        weight = random_values((*leading, x.shape[axis]), device=device)
        check(x, weight, random_positions(tuple(others), device=device), embedding_axis=axis)


def test_weights_can_have_any_strides(device: str) -> None:
    x, positions = random_values((2, 9, 3, 32), device=device), tokens(device)
    every = random_values((32, 6), device=device, seed=1)
    for weight in (
        every.t()[::2],
        every[:, 0],
        every[:1, :1].expand(3, 32),
        every[0, 0].expand(32),
    ):
        actual = torch_rope.norm_apply(x, weight, positions)
        assert_same_bits(actual, torch_rope.norm_apply(x, weight.contiguous(), positions))
        check(x, weight, positions)


NORM_AXES: list[tuple[int, ...]] = [
    (-1,),
    (3,),
    (-2, -1),
    (3, 2),
    (1, -1),
    (0, 3),
    (-1, 0, -2),
    (0, 1, 2, 3),
]


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axes", NORM_AXES, ids=str)
def test_elements_along_norm_axes_share_a_mean(
    device: str, axes: tuple[int, ...], dtype: torch.dtype, norm_last: bool
) -> None:
    # Of heads of very different sizes.
    scale = torch.logspace(-1, 1, 2 * 9 * 3, device=device).reshape(2, 9, 3, 1)
    x = (random_values((2, 9, 3, 64), torch.float32, device) * scale).to(dtype)
    weight = random_values((3, 64), device=device)
    check(x, weight, tokens(device), norm_axes=axes, norm_last=norm_last)
    check(x, None, tokens(device), norm_axes=list(axes), norm_last=norm_last, rotary_dim=32)


@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (0, 1, 2), (-2,)], ids=str)
def test_norm_axes_go_with_any_embedding_axis(device: str, axes: tuple[int, ...]) -> None:
    x = random_values((4, 6, 8), device=device)
    positions, weight = random_positions((8,), device=device), random_values((6,), device=device)
    check(x, weight, positions, embedding_axis=1, norm_axes=axes)
    check(x, weight, positions, embedding_axis=-2, norm_axes=axes, norm_last=True)


def test_a_norm_over_heads_is_that_of_olmo(device: str) -> None:
    # The projection is normalized before it is split into heads.
    x, weight = random_values((2, 9, 96), device=device), random_values((96,), device=device)
    positions = tokens(device)
    normalized = rms_norm(x, (96,), weight, eps=1e-6).unflatten(-1, (3, 32))
    expected = torch_rope.apply(normalized, positions)
    actual = torch_rope.norm_apply(
        x.unflatten(-1, (3, 32)), weight.view(3, 32), positions, norm_axes=(-2, -1)
    )
    torch.testing.assert_close(actual, expected)


def test_the_order_and_the_sign_of_norm_axes_change_nothing(device: str) -> None:
    x, positions = random_values((2, 9, 3, 32), device=device), tokens(device)
    expected = torch_rope.norm_apply(x, None, positions, norm_axes=(-2, -1))
    for axes in ((-1, -2), (2, 3), (3, -2)):
        assert_same_bits(torch_rope.norm_apply(x, None, positions, norm_axes=axes), expected)
    assert_same_bits(
        torch_rope.norm_apply(x, None, positions, norm_axes=(-1,)),
        torch_rope.norm_apply(x, None, positions),
    )


def test_norm_last_normalizes_what_was_rotated(device: str) -> None:
    # A weight after the rotation is not the same as one before it.
    x, weight = random_values((9, 32), torch.float64, device), random_values((32,), device=device)
    positions = random_positions((9,), device=device, low=-9, high=9)
    expected = rms_norm(torch_rope.apply(x, positions), (32,), weight.double(), eps=1e-6)
    actual = torch_rope.norm_apply(x, weight, positions, norm_last=True)
    torch.testing.assert_close(actual, expected)
    first = torch_rope.norm_apply(x, weight, positions)
    assert not torch.allclose(first, expected, rtol=0.1)
    torch.testing.assert_close(
        first, torch_rope.apply(rms_norm(x, (32,), weight.double(), eps=1e-6), positions)
    )


def test_norm_last_takes_the_mean_of_what_tables_made(device: str) -> None:
    # Tables that are no rotation change the mean.
    x = random_values((9, 32), torch.float64, device)
    cos, sin = (random_values((9, 32), torch.float64, device, seed=seed) for seed in (1, 2))
    rotated = torch_rope.apply_cos_sin(x, cos, sin, full_width=True)
    actual = torch_rope.norm_apply_cos_sin(x, None, cos, sin, full_width=True, norm_last=True)
    torch.testing.assert_close(actual, rms_norm(rotated, (32,), eps=1e-6))


# --------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("weights", ["both", "q", "k", "none", "None"])
@pytest.mark.parametrize("in_place", [False, True])
def test_each_of_a_pair_has_its_weight(
    device: str, in_place: bool, weights: str, norm_last: bool
) -> None:
    q = random_values((2, 9, 8, 64), torch.bfloat16, device)
    k = random_values((2, 9, 2, 64), device=device, seed=1)
    q_weight = random_values((8, 64), device=device, seed=2) if weights in ("both", "q") else None
    k_weight = random_values((64,), device=device, seed=3) if weights in ("both", "k") else None
    expected = [
        torch_rope.norm_apply(x, weight, tokens(device), norm_last=norm_last)
        for x, weight in ((q, q_weight), (k, k_weight))
    ]
    function = torch_rope.norm_apply_ if in_place else torch_rope.norm_apply
    given = None if weights == "None" else (q_weight, k_weight)
    with OperatorsSeen() as seen:
        actual = function((q, k), given, tokens(device), norm_last=norm_last)
    assert seen.names == ["norm_apply_qk_" if in_place else "norm_apply_qk"]
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def test_a_pair_of_different_ranks_counts_its_norm_axes_from_the_end_of_each(device: str) -> None:
    q = random_values((2, 9, 8, 64), device=device)
    k = random_values((9, 1, 64), device=device, seed=1)
    positions = tokens(device)
    for axes in ((-2, -1), (0, -1)):
        pair = torch_rope.norm_apply((q, k), None, positions, norm_axes=axes)
        for actual, x in zip(pair, (q, k), strict=True):
            assert_same_bits(actual, torch_rope.norm_apply(x, None, positions, norm_axes=axes))
            assert_rotated(actual, reference.norm_apply(x, None, positions, norm_axes=axes))


def test_lists_are_pairs_too(device: str) -> None:
    q, k = (random_values((9, 64), device=device, seed=seed) for seed in (0, 1))
    weight, positions = random_values((64,), device=device), torch.arange(9, device=device)
    expected = torch_rope.norm_apply((q, k), (weight, None), positions)
    actual = torch_rope.norm_apply([q, k], [weight, None], positions)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)
    pair = [q, k]
    assert torch_rope.norm_apply_(pair, None, positions) is pair


def test_tables_normalize_pairs(device: str) -> None:
    q, k = random_values((2, 9, 8, 64), device=device), random_values((9, 2, 64), device=device)
    weight = random_values((64,), device=device, seed=2)
    cos, sin = (random_values((9, 1, 32), device=device, seed=seed) for seed in (3, 4))
    pair = torch_rope.norm_apply_cos_sin((q, k), (weight, None), cos, sin)
    expected = [
        torch_rope.norm_apply_cos_sin(q, weight, cos, sin),
        torch_rope.norm_apply_cos_sin(k, None, cos, sin),
    ]
    copies = q.clone(), k.clone()
    torch_rope.norm_apply_cos_sin_(copies, (weight, None), cos, sin)
    for one, other, copy in zip(pair, expected, copies, strict=True):
        assert_same_bits(one, other)
        assert_same_bits(copy, other)


# --------------------------------------------------------------------------------------------------
# In place


@pytest.mark.parametrize("axes", [None, (-2, -1)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_q_and_k_of_one_packed_tensor_are_normalized_and_v_is_not(
    device: str, dtype: torch.dtype, axes: tuple[int, ...] | None
) -> None:
    packed = random_values((2, 9, 3, 4, 64), dtype, device)
    q, k, v = packed.unbind(2)
    weight, positions = random_values((64,), device=device), tokens(device)
    expected = (
        torch_rope.norm_apply(q, weight, positions, norm_axes=axes),
        torch_rope.norm_apply(k, None, positions, norm_axes=axes),
        v.clone(),
    )
    torch_rope.norm_apply_((q, k), (weight, None), positions, norm_axes=axes)
    for actual, normalized in zip(packed.unbind(2), expected, strict=True):
        assert_same_bits(actual, normalized)


def test_the_version_counters_of_what_is_written_go_up(device: str) -> None:
    q, k, weight = (random_values((9, 64), device=device, seed=seed) for seed in range(3))
    position, table = torch.tensor(3, device=device), random_values((9, 32), device=device)
    torch_rope.norm_apply_((q, k), (weight, None), position)
    torch_rope.norm_apply_(q, weight, position)
    torch_rope.norm_apply_cos_sin_((q, k), None, table, table)
    torch_rope.norm_apply_cos_sin_(k, None, table, table)
    assert (q._version, k._version, weight._version) == (3, 3, 0)


def test_overlapping_elements_are_refused(device: str) -> None:
    position = torch.tensor(3, device=device)
    expanded = random_values((1, 8), device=device).expand(4, 8)
    with pytest.raises(ValueError, match=r"^rope::norm_apply_\(\): expected x to have each"):
        torch_rope.norm_apply_(expanded, None, position)
    x = random_values((4, 8), device=device)
    before = x.clone()
    with pytest.raises(ValueError, match=r"^rope::norm_apply_qk_\(\): expected q and k to share"):
        torch_rope.norm_apply_((x, x), None, position)
    with pytest.raises(ValueError, match=r"^rope::norm_apply_\(\): expected x to .*weight"):
        torch_rope.norm_apply_(x, x[0], position)
    with pytest.raises(ValueError, match=r"^rope::norm_apply_qk_\(\): expected q to .*k_weight"):
        torch_rope.norm_apply_((x, before.clone()), (None, x[0]), position)
    assert_same_bits(x, before)


def test_what_is_functional_may_share_memory_with_its_weight(device: str) -> None:
    x, position = random_values((4, 8), device=device), torch.tensor(3, device=device)
    expected = torch_rope.norm_apply(x, x[0].clone(), position)
    assert_same_bits(torch_rope.norm_apply(x, x[0], position), expected)


def test_a_lazily_negated_view_is_normalized_as_what_it_shows(device: str) -> None:
    base = torch.view_as_complex(random_values((2, 9, 64, 2), device=device))
    (q, k), positions = base.conj().imag, torch.arange(9, device=device)
    weight = torch._neg_view(random_values((64,), device=device))
    assert q.is_neg()
    expected = torch_rope.norm_apply(
        (q.resolve_neg(), k.resolve_neg()), (weight.resolve_neg(), None), positions
    )
    pair = torch_rope.norm_apply((q, k), (weight, None), positions)
    torch_rope.norm_apply_((q, k), (weight, None), positions)
    for actual, other, view in zip(pair, expected, (q, k), strict=True):
        assert_same_bits(actual, other)
        assert_same_bits(view.resolve_neg(), other)


# --------------------------------------------------------------------------------------------------
# Composition


@pytest.mark.parametrize("name", ["norm_apply", "norm_apply_cos_sin"])
def test_the_schema_of_the_decomposition_is_that_of_the_operator(name: str) -> None:
    schemas = [
        str(getattr(torch.ops.rope, one).default._schema).partition("(")[2]
        for one in (name, f"{name}_composed")
    ]
    assert schemas[0] == schemas[1]


@pytest.mark.parametrize("norm_last", [False, True])
def test_a_norm_and_a_rotation_are_the_two_operators(device: str, norm_last: bool) -> None:
    x, weight = random_values((2, 9, 3, 64), torch.float64, device), random_values((64,))
    weight, positions = weight.to(device), tokens(device)
    norm = torch_rope.norm_apply(x, weight, positions, rotary_dim=0)
    expected = torch_rope.apply(norm, positions)
    if norm_last:
        rotated = torch_rope.apply(x, positions)
        expected = torch_rope.norm_apply(rotated, weight, positions, rotary_dim=0)
    actual = torch_rope.norm_apply(x, weight, positions, norm_last=norm_last)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_reference_is_the_formula() -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    weight = torch.tensor([2.0, 10.0], dtype=torch.float64)
    quarter = torch.tensor(torch.pi / 2, dtype=torch.float64)
    root = (12.5 + 0.5) ** 0.5
    expected: Expected = reference.norm_apply(x, weight, quarter, eps=0.5)
    torch.testing.assert_close(expected.values, torch.tensor([-40.0, 6.0]).double() / root)
    expected = reference.norm_apply(x, weight, quarter, eps=0.5, norm_last=True)
    torch.testing.assert_close(expected.values, torch.tensor([-8.0, 30.0]).double() / root)
