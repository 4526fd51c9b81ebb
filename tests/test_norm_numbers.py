"""How exact norms are, and what never changes a bit of them."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch_rope
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    assert_rotated,
    assert_same_bits,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import FLOAT_DTYPES, Normalization, normalizations, stored
from torch import Tensor

CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")


def check(x: Tensor, weight: Tensor | None, positions: Tensor, **options: Any) -> None:
    """Compares ``norm_apply`` with the reference."""
    actual = torch_rope.norm_apply(x, weight, positions, **options)
    assert_rotated(actual, reference.norm_apply(x, weight, positions, **options))


# --------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [1024, 4096, 8190, 65536])
def test_wide_rows_are_exact(device: str, size: int, dtype: torch.dtype, norm_last: bool) -> None:
    x = random_values((3, size), dtype, device)
    weight = random_values((size,), dtype, device, seed=1)
    positions = torch.arange(3, device=device)
    check(x, weight, positions, norm_last=norm_last)
    # All terms have one sign, so a single running sum would lose their low bits.
    check(x.abs() + 3, weight, positions, norm_last=norm_last)


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("value", [1.0, 1 / 3, 1.7, 300.1])
@pytest.mark.parametrize("size", [64, 4096])
def test_equal_values_are_exact(
    device: str, size: int, value: float, dtype: torch.dtype, norm_last: bool
) -> None:
    # Of the squares of equal values, every rounding error has one sign.
    x = torch.full((2, size), value, dtype=dtype, device=device)
    positions = torch.arange(2, device=device)
    check(x, None, positions, norm_last=norm_last)
    check(x, None, positions, norm_last=norm_last, rotary_dim=0, eps=0.0)


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "size"), [(32, 128), (40, 128), (5, 90), (128, 64), (1, 4096), (700, 6)]
)
def test_norms_over_many_heads_are_exact(
    device: str, heads: int, size: int, dtype: torch.dtype, norm_last: bool
) -> None:
    x = random_values((7, heads, size), dtype, device).abs() + 1
    weight = random_values((heads, size), dtype, device, seed=1)
    positions = random_positions((7, 1), device=device)
    check(x, weight, positions, norm_axes=(-2, -1), norm_last=norm_last)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    check(apart, weight, positions, norm_axes=(-2, -1), norm_last=norm_last)


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("exponent", [-55, -30, -10, 10, 30, 55])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_of_any_size_whose_squares_are_normal_are_exact(
    device: str, dtype: torch.dtype, exponent: int, norm_last: bool
) -> None:
    # Each element at least a tenth: the squares of float32 stay above 2**-126 and below 2**128.
    x = random_values((9, 128), torch.float64, device)
    x = (x.sign() * (x.abs() + 0.1) * 2.0**exponent).to(dtype)
    positions = random_positions((9,), device=device)
    for eps in (0.0, 1e-6):
        check(x, None, positions, eps=eps, norm_last=norm_last)


@pytest.mark.parametrize("norm_last", [False, True])
def test_one_large_element_among_small_ones(device: str, norm_last: bool) -> None:
    x = 1e-3 * random_values((128, 128), device=device)
    x.diagonal().fill_(1e3)
    check(x, None, random_positions((128,), device=device), norm_last=norm_last)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm_last", [False, True])
def test_weights_of_very_different_sizes(device: str, norm_last: bool, interleaved: bool) -> None:
    x = random_values((64, 128), device=device)
    weight = torch.logspace(-6, 6, 128, device=device)[torch.randperm(128)]
    positions = random_positions((64,), device=device)
    check(x, weight, positions, norm_last=norm_last, interleaved=interleaved)


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("axes", [None, (-2, -1)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_zeros_stay_zeros(
    device: str, dtype: torch.dtype, axes: tuple[int, ...] | None, norm_last: bool
) -> None:
    x = random_values((5, 3, 70), dtype, device)
    x[2] = 0
    x[3, 1] = 0
    weight = random_values((70,), dtype, device, seed=1)
    positions = random_positions((5, 1), device=device)
    for eps in (1e-6, 1e-30):
        actual = torch_rope.norm_apply(
            x, weight, positions, eps=eps, norm_axes=axes, norm_last=norm_last
        )
        assert not actual[2].any()
        assert not actual[3, 1].any()
        assert actual[[0, 1, 4]].all()
        assert actual.isfinite().all()


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("axes", [None, (-2, -1)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "overflow"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_what_is_not_finite_stays_with_its_mean(
    device: str,
    dtype: torch.dtype,
    value: float | str,
    axes: tuple[int, ...] | None,
    norm_last: bool,
) -> None:
    heads, size = 3, 74
    x = random_values((size, heads, size), dtype, device)
    weight = random_values((heads, size), device=device, seed=1)
    positions = random_positions((size, 1), device=device)

    def normalize(x: Tensor) -> Tensor:
        return torch_rope.norm_apply(x, weight, positions, norm_axes=axes, norm_last=norm_last)

    expected = normalize(x)
    # In every second token, of one head, at every place.
    number = torch.finfo(dtype).max if value == "overflow" else float(value)
    tokens = torch.arange(0, size, 2, device=device)
    for column in (tokens, tokens + 1):
        y = x.clone()
        y[tokens, 1, column] = number
        actual = normalize(y)
        others = actual.clone(), expected.clone()
        for tensor in others:
            if axes is None:
                tensor[tokens, 1] = 0
            else:
                tensor[tokens] = 0
        assert_same_bits(*others)
        if value != "overflow":
            own = actual[tokens, 1] if axes is None else actual[tokens]
            assert bool(own.isnan().any()) or value != value
            if value != value:
                assert own.isnan().all()


def test_the_outputs_overflow_as_their_dtype_does(device: str) -> None:
    x = torch.ones(4, 8, dtype=torch.float16, device=device)
    weight = torch.full((8,), 1e5, device=device)
    actual = torch_rope.norm_apply(x, weight, torch.tensor(0, device=device))
    assert actual.isinf().all()


# --------------------------------------------------------------------------------------------------
# Bits


FORMS = pytest.mark.parametrize("tables", [False, True], ids=["positions", "tables"])


@FORMS
@given(data=st.data())
def test_no_layout_changes_a_bit(device: str, tables: bool, data: st.DataObject) -> None:
    call: Normalization = data.draw(normalizations(tables=tables))
    arguments = call.tensors(device)
    function = torch_rope.norm_apply_cos_sin if tables else torch_rope.norm_apply
    dense = [None if tensor is None else tensor.contiguous() for tensor in arguments]
    assert_same_bits(
        function(*arguments, **call.options),
        function(*dense, **call.options),
    )


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("axes", [None, (-2, -1), (1, -1)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_order_of_dimensions_in_memory_gives_the_same_bits(
    device: str,
    dtype: torch.dtype,
    interleaved: bool,
    axes: tuple[int, ...] | None,
    norm_last: bool,
) -> None:
    options = {
        "rotary_dim": 62,
        "rotary_offset": 3,
        "interleaved": interleaved,
        "norm_axes": axes,
        "norm_last": norm_last,
    }
    x = random_values((2, 19, 5, 70), dtype, device)
    weight = random_values((70,), device=device, seed=1)
    positions = random_positions((19, 1), device=device)
    expected = torch_rope.norm_apply(x, weight, positions, **options)
    for order, step in itertools.product(((0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2)), (1, 2)):
        y = stored(x, order, step)
        assert_same_bits(torch_rope.norm_apply(y, weight, positions, **options), expected)
        pair = torch_rope.norm_apply((y, x), (weight, None), positions, **options)
        assert_same_bits(pair[0], expected)
        torch_rope.norm_apply_(y, weight, positions, **options)
        assert_same_bits(y, expected)


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("axes", [None, (-2, -1)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 512])
def test_rows_of_whole_vectors_have_the_bits_of_strided_ones(
    device: str,
    size: int,
    dtype: torch.dtype,
    interleaved: bool,
    axes: tuple[int, ...] | None,
    norm_last: bool,
) -> None:
    # Many rows: an order of sums shows in few of them.
    x = random_values((500, 2, size), dtype, device)
    weight = random_values((size,), device=device, seed=1)
    positions = torch.arange(500, device=device)[:, None]
    options = {"interleaved": interleaved, "norm_axes": axes, "norm_last": norm_last}
    expected = torch_rope.norm_apply(x, weight, positions, **options)
    strided = stored(x, (0, 1, 2), 2)
    assert_same_bits(torch_rope.norm_apply(strided, weight, positions, **options), expected)
    one_for_each_head = weight.repeat(2, 1)
    actual = torch_rope.norm_apply(x, one_for_each_head, positions, **options)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("axes", [(-2, -1), (1, -1)], ids=str)
def test_expanded_angles_have_the_bits_of_broadcast_ones(
    device: str, axes: tuple[int, ...]
) -> None:
    x = random_values((99, 4, 5, 24), device=device)
    positions = torch.arange(99, device=device)[:, None, None]
    cos, sin = (random_values((99, 1, 1, 12), device=device, seed=seed) for seed in (1, 2))
    assert_same_bits(
        torch_rope.norm_apply(x, None, positions.expand(99, 4, 5), norm_axes=axes),
        torch_rope.norm_apply(x, None, positions, norm_axes=axes),
    )
    tables = [table.expand(99, 4, 5, 12) for table in (cos, sin)]
    assert_same_bits(
        torch_rope.norm_apply_cos_sin(x, None, *tables, norm_axes=axes),
        torch_rope.norm_apply_cos_sin(x, None, cos, sin, norm_axes=axes),
    )


@pytest.mark.parametrize("tables", [False, True])
def test_many_dimensions_that_do_not_coalesce_have_the_bits_of_contiguous_ones(
    device: str, tables: bool
) -> None:
    rows = [2] * 15
    x = random_values((*rows, 24), device=device)
    strided = stored(x, tuple(range(14, -1, -2)) + tuple(range(13, -1, -2)) + (15,), 1)
    options = {"norm_axes": (0, 3, -1)}
    sizes = [1 if d in (0, 3) else 2 for d in range(15)]
    if tables:
        angles = [random_values((*sizes, 12), device=device, seed=seed) for seed in (1, 2)]
        function = torch_rope.norm_apply_cos_sin
    else:
        angles = [random_positions(tuple(sizes), device=device)]
        function = torch_rope.norm_apply
    expected = function(x, None, *angles, **options)
    assert_same_bits(function(strided, None, *angles, **options), expected)


def test_norm_axes_of_more_than_64_dimensions(device: str) -> None:
    x = random_values((2, *[1] * 70, 8), device=device)
    position = torch.tensor(3, device=device)
    actual = torch_rope.norm_apply(x, None, position, norm_axes=(0, -1))
    expected = torch_rope.norm_apply(x.view(2, 8), None, position, norm_axes=(0, -1))
    assert_same_bits(actual, expected.view(x.shape))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after the test."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("axes", [None, (-2, -1), (1, -1), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_of_threads_changes_a_bit(
    device: str, dtype: torch.dtype, axes: tuple[int, ...] | None
) -> None:
    x = random_values((3, 301, 7, 128), dtype, device)
    weight = random_values((7, 128), device=device, seed=1)
    positions = random_positions((301, 1), device=device)
    results = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        results.append(torch_rope.norm_apply(x, weight, positions, norm_axes=axes))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("axes", [None, (-2, -1)], ids=str)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(
    device: str,
    axes: tuple[int, ...] | None,
    dtype: torch.dtype,
    interleaved: bool,
    norm_last: bool,
) -> None:
    x = random_values((3, 19, 5, 70), dtype, device)
    weight = random_values((5, 70), device=device, seed=1)
    positions = random_positions((3, 19, 1), device=device)
    options = {"interleaved": interleaved, "norm_last": norm_last, "norm_axes": axes}
    expected = torch_rope.norm_apply(x, weight, positions, **options)
    for batch, token in itertools.product(range(3), (0, 1, 7, 18)):
        alone = torch_rope.norm_apply(x[batch, token], weight, positions[batch, token], **options)
        assert_same_bits(alone, expected[batch, token])
        if axes is None:
            head = torch_rope.norm_apply(
                x[batch, token, 4], weight[4], positions[batch, token, 0], **options
            )
            assert_same_bits(head, expected[batch, token, 4])
    for tokens in (1, 2, 5, 16):
        part = torch_rope.norm_apply(x[:, :tokens], weight, positions[:, :tokens], **options)
        assert_same_bits(part, expected[:, :tokens])


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [2, 8, 34, 64, 150])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_token_with_a_weight_of_its_own_has_the_same_bits_alone(
    device: str, dtype: torch.dtype, size: int, interleaved: bool, norm_last: bool
) -> None:
    x = random_values((67, size), dtype, device)
    weight = random_values((67, size), dtype, device, seed=1)
    positions = random_positions((67,), device=device)
    options = {"interleaved": interleaved, "norm_last": norm_last}
    expected = torch_rope.norm_apply(x, weight, positions, **options)
    for token in range(67):
        alone = torch_rope.norm_apply(x[token], weight[token], positions[token], **options)
        assert_same_bits(alone, expected[token])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "axes"),
    [(8, 128, None), (16, 64, (-2, -1)), (5, 72, None), (7, 74, (-2, -1))],
)
def test_a_large_tensor_gets_the_bits_of_its_parts(
    device: str,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    axes: tuple[int, ...] | None,
) -> None:
    repeats = 1 + 2**24 // (64 * heads * head_dim * dtype.itemsize)  # some 16 MiB
    tokens = 64 * repeats
    positions = random_positions((tokens, 1), device=device)
    weight = random_values((heads, head_dim), device=device, seed=1)
    by_token = random_values((64, heads, head_dim), dtype=dtype, device=device)
    by_head = random_values((heads, 64, head_dim), dtype=dtype, device=device)
    for x in (by_token.repeat(repeats, 1, 1), by_head.repeat(1, repeats, 1).transpose(0, 1)):
        actual = torch_rope.norm_apply(x, weight, positions, norm_axes=axes)
        few = 1000 // heads
        for begin in (0, tokens // 2 - 1, tokens - few):
            part = slice(begin, begin + few)
            expected = torch_rope.norm_apply(x[part], weight, positions[part], norm_axes=axes)
            assert_same_bits(actual[part], expected)
        torch_rope.norm_apply_(x, weight, positions, norm_axes=axes)
        assert_same_bits(x, actual)


# --------------------------------------------------------------------------------------------------
# CPU capabilities


NORMALIZE_AND_SAVE = """
import sys
import torch
import torch_rope

results = []
for tensors, upstream, options in torch.load(sys.argv[1]):
    leaves = [x.requires_grad_(x.is_floating_point() and x.dim() > 1) for x in tensors]
    leaves[1].requires_grad_()
    result = torch_rope.norm_apply(*leaves, **options)
    results.append((result.detach(), *torch.autograd.grad(result, leaves[:2], upstream)))
torch.save((torch.backends.cpu.get_cpu_capability(), results), sys.argv[2])
"""

Call = tuple[tuple[Tensor, ...], Tensor, dict[str, Any]]


def calls_of_every_kind() -> list[Call]:
    """Lists calls of every dtype and kind, in whole vectors and not, with upstream gradients."""
    calls: list[Call] = []
    for size, dtype in itertools.product((128, 150), FLOAT_DTYPES):
        shape = (17, 3, size)
        tensors = (
            random_values(shape, dtype),
            random_values((3, size), dtype, seed=1),
            random_positions((17, 1)),
        )
        inv_freq = random_inv_freq((size // 2,), torch.float32)
        for interleaved, axes, norm_last in itertools.product(
            (False, True), (None, (-2, -1)), (False, True)
        ):
            options = {"interleaved": interleaved, "norm_axes": axes, "norm_last": norm_last}
            given = (*tensors, inv_freq) if interleaved else tensors
            calls.append((given, random_values(shape, dtype, seed=2), options))
    return calls


@pytest.fixture(scope="module")
def by_capability(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What a process of each capability that this CPU has makes of the calls."""
    folder = tmp_path_factory.mktemp("capabilities")
    torch.save(calls_of_every_kind(), folder / "calls.pt")
    best = torch.backends.cpu.get_cpu_capability()
    available = CAPABILITIES[: CAPABILITIES.index(best) + 1] if best in CAPABILITIES else ()
    return {capability: normalize_with(capability, folder) for capability in available}


def normalize_with(capability: str, folder: Path) -> list[Any]:
    """Makes the calls in a process that torch tells to use a capability."""
    output = folder / f"{capability}.pt"
    subprocess.run(
        [sys.executable, "-c", NORMALIZE_AND_SAVE, str(folder / "calls.pt"), str(output)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
        cwd=folder,
        check=True,
    )
    used, results = torch.load(output)
    assert used == capability
    return list(results)


def exact_gradients(
    tensors: tuple[Tensor, ...], upstream: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Returns the gradients of x and the weight in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors[:2]]
    result = reference.norm_apply(*leaves, *tensors[2:], **options).values
    return torch.autograd.grad(result, leaves, upstream.double())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_cpu_capability_matches_the_reference(
    capability: str, by_capability: dict[str, list[Any]]
) -> None:
    if capability not in by_capability:
        pytest.skip(f"this CPU has no {capability}")
    for (tensors, upstream, options), (actual, *gradients) in zip(
        calls_of_every_kind(), by_capability[capability], strict=True
    ):
        assert_rotated(actual, reference.norm_apply(*tensors, **options))
        exact = exact_gradients(tensors, upstream, options)
        for gradient, other in zip(gradients, exact, strict=True):
            allowed = 2e-5 * other.abs().max()
            allowed = allowed + reference.half_ulp(other.abs() + allowed, gradient.dtype)
            assert ((gradient.double() - other).abs() <= allowed).all()
