"""Strides in and out, on every device and where there is no data."""

import pytest
import torch
import torch_rope
from hypothesis import given
from reference import assert_same_bits, bits, random_inv_freq, random_positions, random_values
from strategies import Application, TableApplication, applications, stored, table_applications
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def assert_like(actual: Tensor, expected: Tensor) -> None:
    """Asserts that two tensors agree in everything but their device and data."""
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    assert actual.dtype == expected.dtype
    assert actual.storage_offset() == expected.storage_offset()


@given(application=applications())
def test_any_call_gives_the_strides_of_empty_like(device: str, application: Application) -> None:
    x, positions, inv_freq = application.tensors(device)
    rotated = torch_rope.apply(x, positions, inv_freq, **application.options)
    assert_like(rotated, torch.empty_like(x))


@given(application=table_applications())
def test_any_call_with_tables_gives_the_strides_of_empty_like(
    device: str, application: TableApplication
) -> None:
    x, cos, sin, positions = application.tensors(device)
    rotated = torch_rope.apply_cos_sin(x, cos, sin, positions, **application.options)
    assert_like(rotated, torch.empty_like(x))


def test_rotation_keeps_the_strides_of_a_transposed_input(device: str) -> None:
    x = random_values((2, 4, 9, 64), device=device).transpose(1, 2)
    assert torch_rope.apply(x, torch.arange(9, device=device)[:, None]).stride() == x.stride()


def test_rotation_keeps_the_strides_of_a_transposed_embedding_axis(device: str) -> None:
    x = random_values((2, 64, 9), device=device).transpose(1, 2)
    assert torch_rope.apply(x, torch.arange(9, device=device)).stride() == x.stride()


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2), (1, 3, 2, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_order_of_dimensions_in_memory_gives_the_same_bits(
    device: str, dtype: torch.dtype, interleaved: bool, order: tuple[int, ...], step: int
) -> None:
    shape = [2, 5, 3, 70]
    shape[order[-1]] = 150 if order[-1] < 3 else 70
    x = random_values(tuple(shape), dtype, device)
    positions = torch.arange(shape[1], device=device)[:, None]
    cos, sin = random_values((2, shape[1], 1, 62), device=device)

    def results(x: Tensor) -> tuple[Tensor, Tensor]:
        by_position = torch_rope.apply(
            x, positions, rotary_dim=62, rotary_offset=3, interleaved=interleaved
        )
        by_tables = torch_rope.apply_cos_sin(x, cos, sin, interleaved=interleaved, full_width=True)
        return by_position, by_tables

    expected = results(x)
    y = stored(x, order, step)
    for actual, wanted in zip(results(y), expected, strict=True):
        assert_same_bits(actual, wanted)
    torch_rope.apply_(y, positions, rotary_dim=62, rotary_offset=3, interleaved=interleaved)
    assert_same_bits(y, expected[0])
    pair = torch_rope.apply((stored(x, order, step), x), positions, interleaved=interleaved)
    assert_same_bits(pair[0], pair[1])


def test_rotation_keeps_channels_last(device: str) -> None:
    x = random_values((2, 64, 5, 7), device=device).to(memory_format=torch.channels_last)
    rotated = torch_rope.apply(x, torch.arange(7, device=device), embedding_axis=1)
    assert rotated.is_contiguous(memory_format=torch.channels_last)


def test_rotation_of_a_slice_is_dense(device: str) -> None:
    packed = random_values((2, 9, 3, 4, 64), device=device)
    rotated = torch_rope.apply(packed[:, :, 0], torch.arange(9, device=device)[:, None])
    assert rotated.is_contiguous()


def test_rotation_of_a_slice_keeps_the_order_of_its_dimensions(device: str) -> None:
    packed = random_values((2, 4, 9, 3, 64), device=device)
    rotated = torch_rope.apply(packed[..., 0, :].transpose(1, 2), torch.tensor(3, device=device))
    assert rotated.transpose(1, 2).is_contiguous()


def test_rotation_of_an_expanded_input_has_an_element_for_each(device: str) -> None:
    x = random_values((1, 9, 64), device=device).expand(4, 9, 64)
    rotated = torch_rope.apply(x, torch.arange(9, device=device))
    assert_like(rotated, torch.empty_like(x))
    assert len({element.data_ptr() for row in rotated for element in row}) == 36


def test_a_lazily_negated_view_is_rotated_as_what_it_shows(device: str) -> None:
    base = torch.view_as_complex(random_values((9, 64, 2), device=device))
    x, positions = base.conj().imag, torch.arange(9, device=device)
    assert x.is_neg()
    expected = torch_rope.apply(x.resolve_neg(), positions)
    assert_same_bits(torch_rope.apply(x, positions), expected)
    torch_rope.apply_(x, positions)
    assert_same_bits(x.resolve_neg(), expected)


def test_two_lazily_negated_views_are_rotated_in_place(device: str) -> None:
    base = torch.view_as_complex(random_values((2, 9, 64, 2), device=device))
    (q, k), positions = base.conj().imag, torch.arange(9, device=device)
    expected = torch_rope.apply((q.resolve_neg(), k.resolve_neg()), positions)
    torch_rope.apply_((q, k), positions)
    assert_same_bits(torch.stack((q, k)).resolve_neg(), torch.stack(expected))
    cos, sin = torch.randn(2, 9, 32, device=device)
    expected = torch_rope.apply_cos_sin((q.resolve_neg(), k.resolve_neg()), cos, sin)
    torch_rope.apply_cos_sin_((q, k), cos, sin)
    assert_same_bits(torch.stack((q, k)).resolve_neg(), torch.stack(expected))


def test_lazily_negated_angles_are_those_they_show(device: str) -> None:
    x = random_values((9, 64), device=device)
    positions = torch._neg_view(torch.arange(9.0, device=device))
    expected = torch_rope.apply(x, positions.resolve_neg())
    assert_same_bits(torch_rope.apply(x, positions), expected)
    torch_rope.apply_(x, positions)
    assert_same_bits(x, expected)


def test_each_of_a_pair_has_its_own_strides(device: str) -> None:
    q = random_values((2, 4, 9, 64), device=device).transpose(1, 2)
    k = random_values((2, 9, 4, 64), torch.bfloat16, device)
    for rotated, x in zip(
        torch_rope.apply((q, k), torch.tensor(3, device=device)), (q, k), strict=True
    ):
        assert_like(rotated, torch.empty_like(x))


@given(application=applications())
def test_the_input_is_not_modified(device: str, application: Application) -> None:
    tensors = [tensor for tensor in application.tensors(device) if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    torch_rope.apply(*tensors, **application.options)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_the_output_shares_no_memory_with_the_input(device: str) -> None:
    x = random_values((9, 64), device=device)
    before = bits(x)
    for rotary_dim in (None, 0):
        torch_rope.apply(x, torch.tensor(0, device=device), rotary_dim=rotary_dim).zero_()
        assert torch.equal(bits(x), before)


@given(application=applications())
def test_meta_tensors_give_the_strides_of_empty_like(application: Application) -> None:
    x, positions, inv_freq = application.tensors("cpu")
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    rotated = torch_rope.apply(
        meta,
        positions.to("meta"),
        None if inv_freq is None else inv_freq.to("meta"),
        **application.options,
    )
    assert rotated.device.type == "meta"
    assert_like(rotated, torch.empty_like(meta))


@given(application=table_applications())
def test_meta_tensors_and_tables_give_the_strides_of_empty_like(
    application: TableApplication,
) -> None:
    x, cos, sin, positions = application.tensors("cpu")
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    rotated = torch_rope.apply_cos_sin(
        meta,
        cos.to("meta"),
        sin.to("meta"),
        None if positions is None else positions.to("meta"),
        **application.options,
    )
    assert rotated.device.type == "meta"
    assert_like(rotated, torch.empty_like(meta))


def test_a_pair_of_meta_tensors_gives_the_same_layouts() -> None:
    q = torch.empty(2, 4, 9, 64, device="meta").transpose(1, 2)
    k = torch.empty(2, 9, 2, 64, dtype=torch.float16, device="meta")
    positions = torch.empty(9, 1, device="meta")
    table = torch.empty(9, 1, 32, device="meta")
    pairs = torch_rope.apply((q, k), positions), torch_rope.apply_cos_sin((q, k), table, table)
    for pair in pairs:
        assert_like(pair[0], q)
        assert_like(pair[1], k)


def test_meta_tensors_are_taken_in_place() -> None:
    q, k = torch.empty(9, 64, device="meta"), torch.empty(9, 64, device="meta")
    table = torch.empty(9, 32, device="meta")
    assert torch_rope.apply_(q, torch.empty(9, device="meta")) is q
    assert torch_rope.apply_((q, k), torch.empty(9, device="meta"))[1] is k
    assert torch_rope.apply_cos_sin_(q, table, table) is q
    assert torch_rope.apply_cos_sin_((q, k), table, table)[1] is k


def test_fake_tensors_give_the_same_layout(device: str) -> None:
    x = random_values((2, 4, 9, 3, 64), torch.bfloat16, device)[..., 0, :].transpose(1, 2)
    positions = random_positions((9, 1), device=device)
    table = random_values((9, 1, 32), device=device)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (x, positions, table)]
        rotated = torch_rope.apply(fakes[0], fakes[1])
        by_tables = torch_rope.apply_cos_sin(fakes[0], fakes[2], fakes[2])
    for actual in (rotated, by_tables):
        assert actual.device == x.device
        assert_like(actual, torch.empty_like(x))


def test_a_graph_traced_with_symbolic_sizes_serves_other_sizes(device: str) -> None:
    def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        return torch_rope.apply(x, positions, inv_freq, rotary_offset=4)

    def arguments(batch: int, tokens: int, heads: int, axis: int) -> tuple[Tensor, ...]:
        return (
            random_values((batch, heads, tokens, axis), device=device).transpose(1, 2),
            random_positions((tokens, 1), device=device),
            random_inv_freq((10,), device=device),
        )

    graph = make_fx(rotate, tracing_mode="symbolic")(*arguments(2, 9, 4, 64))
    for sizes in ((2, 9, 4, 64), (3, 17, 5, 48)):
        inputs = arguments(*sizes)
        rotated = graph(*inputs)
        assert_like(rotated, inputs[0])
        assert_same_bits(rotated, rotate(*inputs))


def test_a_graph_of_tables_traced_with_symbolic_sizes_serves_other_sizes(device: str) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        return torch_rope.apply_cos_sin(x, cos, sin, positions)

    def arguments(tokens: int, pairs: int) -> tuple[Tensor, ...]:
        return (
            random_values((tokens, 4, 2 * pairs), device=device),
            random_values((100, pairs), device=device),
            random_values((100, pairs), device=device),
            random_positions((tokens, 1), low=0, high=100, device=device),
        )

    graph = make_fx(rotate, tracing_mode="symbolic")(*arguments(9, 32))
    inputs = arguments(17, 24)
    assert_same_bits(graph(*inputs), rotate(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_empty_tensors_keep_their_strides(device: str, dtype: torch.dtype) -> None:
    x = torch.empty(3, 0, 8, dtype=dtype, device=device).transpose(0, 2)
    rotated = torch_rope.apply(x, torch.tensor(3, device=device), embedding_axis=0)
    assert_like(rotated, torch.empty_like(x))


@pytest.mark.parametrize("axis", [-1, 5])
@pytest.mark.parametrize("angles", ["positions", "axes", "tables", "rows"])
def test_more_dimensions_than_a_launch_has_are_rotated(device: str, angles: str, axis: int) -> None:
    sizes = (2,) * 14
    # In memory the dimensions of x are in the opposite order of those of the angles.
    x = random_values((*sizes, 4), device=device).permute(*reversed(range(14)), 14)
    rows = x.reshape(-1, 4)
    x = x.movedim(-1, axis)
    positions = random_positions(sizes, device=device)
    inv_freq = random_inv_freq((2, 2), device=device)
    tables = random_values((9, 2), device=device), random_values((9, 2), seed=1, device=device)
    if angles == "positions":
        rotated = torch_rope.apply(x, positions, embedding_axis=axis)
        expected = torch_rope.apply(rows, positions.flatten())
    elif angles == "axes":
        both = torch.stack((positions, -positions))
        rotated = torch_rope.apply(x, both, inv_freq, embedding_axis=axis)
        expected = torch_rope.apply(rows, both.flatten(1), inv_freq)
    elif angles == "tables":
        cos, sin = (table[positions.long() % 9] for table in tables)
        rotated = torch_rope.apply_cos_sin(x, cos, sin, embedding_axis=axis)
        expected = torch_rope.apply_cos_sin(rows, cos.flatten(0, -2), sin.flatten(0, -2))
    else:
        named = positions.long() % 9
        rotated = torch_rope.apply_cos_sin(x, *tables, named, embedding_axis=axis)
        expected = torch_rope.apply_cos_sin(rows, *tables, named.flatten())
    assert_same_bits(rotated.movedim(axis, -1).reshape(-1, 4), expected)
    assert rotated.stride() == torch.empty_like(x).stride()


def test_a_pair_with_more_dimensions_than_a_launch_has_is_rotated_in_place(device: str) -> None:
    sizes = (2,) * 14
    order = (*reversed(range(14)), 14)
    q = random_values((*sizes, 4), device=device).permute(order)
    k = random_values((*sizes, 4), seed=1, device=device).permute(order)
    positions = random_positions(sizes, device=device)
    expected = torch_rope.apply(q.contiguous(), positions), torch_rope.apply(k, positions)
    torch_rope.apply_((q, k), positions)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])
