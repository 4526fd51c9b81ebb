"""Sizes at both ends: beyond 2^31 elements and bytes, very many rows, very long ones, and none.

    python -m pytest tests/test_sizes.py            without large tests on the CPU
    python -m pytest tests/test_sizes.py --large    all of them: up to 5 GiB

What depends on the launch arithmetic of CUDA runs on the CPU, in tests/cpp/test_cuda_threads.cpp.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch_rope
from reference import (
    assert_rotated,
    assert_same_bits,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import FLOAT_DTYPES
from torch import Tensor

CONVENTIONS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbors"])
FAMILIES = pytest.mark.parametrize("norm", [False, True], ids=["apply", "norm_apply"])
FORMS = pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])


def rotate(norm: bool, x: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """Rotates x, after a norm or not, out of place."""
    weight = (None,) if norm else ()
    return (torch_rope.norm_apply if norm else torch_rope.apply)(x, *weight, positions, **options)


def rotate_(norm: bool, x: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """The same in place."""
    weight = (None,) if norm else ()
    return (torch_rope.norm_apply_ if norm else torch_rope.apply_)(x, *weight, positions, **options)


# --------------------------------------------------------------------------------------------------
# Beyond 2^31


@pytest.mark.large(gib=5)
@pytest.mark.usefixtures("unused_memory_is_freed")
@FORMS
@FAMILIES
@CONVENTIONS
def test_more_than_2_to_the_31_elements(
    device: str, norm: bool, interleaved: bool, in_place: bool
) -> None:
    tokens = 2**31 // 2**13 + 3
    # On the CPU, memory that is only read takes none.
    x = torch.empty(tokens, 64, 128, dtype=torch.bfloat16, device=device)
    rows = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device=device)
    some = random_values((len(rows), 64, 128), torch.bfloat16, device)
    x[rows] = some
    positions = torch.arange(tokens, device=device).unsqueeze(-1)
    actual = (rotate_ if in_place else rotate)(norm, x, positions, interleaved=interleaved)
    expected = rotate(norm, some, rows.unsqueeze(-1), interleaved=interleaved)
    assert_same_bits(actual[rows], expected)
    if not in_place:
        assert_same_bits(x[rows], some)


@pytest.mark.large(gib=5)
@pytest.mark.usefixtures("unused_memory_is_freed")
@pytest.mark.parametrize("along", ["tokens", "heads"])
@FAMILIES
def test_more_than_2_to_the_31_elements_where_the_embedding_axis_comes_first(
    device: str, norm: bool, along: str
) -> None:
    count = 2**24 + 5
    x = torch.empty(128, count, dtype=torch.bfloat16, device=device)
    places = torch.tensor([0, 1, count // 2, count - 2, count - 1], device=device)
    some = random_values((128, len(places)), torch.bfloat16, device)
    x[:, places] = some
    positions, of_places = torch.tensor(77, device=device), torch.tensor(77, device=device)
    if along == "tokens":
        positions, of_places = torch.arange(count, device=device), places
    options = {"interleaved": along == "heads", "embedding_axis": 0}
    rotate_(norm, x, positions, **options)
    assert_same_bits(x[:, places], rotate(norm, some, of_places, **options))


@pytest.mark.large(gib=3)
@pytest.mark.usefixtures("unused_memory_is_freed")
@pytest.mark.parametrize(("norm", "in_place"), [(False, True), (True, False)], ids=str)
def test_more_than_2_to_the_31_bytes(device: str, norm: bool, in_place: bool) -> None:
    tokens = 2**31 // 2**15 + 3
    x = torch.empty(tokens, 64, 128, device=device)
    rows = torch.tensor([0, tokens // 2, tokens - 1], device=device)
    some = random_values((len(rows), 64, 128), device=device)
    x[rows] = some
    positions = torch.arange(tokens, device=device).unsqueeze(-1)
    actual = (rotate_ if in_place else rotate)(norm, x, positions)
    assert_same_bits(actual[rows], rotate(norm, some, rows.unsqueeze(-1)))


FAR = 2**31 + 64


@pytest.fixture(scope="module")
def far_memory(device: str) -> Iterator[Tensor]:
    """Memory of more than 2^32 elements; on the CPU what nothing touches takes none."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("less than 10 GiB of free device memory")
    yield torch.empty(2 * FAR + 64, dtype=torch.bfloat16, device=device)
    if device == "cuda":
        torch.cuda.empty_cache()


@FAMILIES
@pytest.mark.parametrize("far_dim", ["tokens", "heads", "axis"])
def test_elements_further_apart_than_2_to_the_31(
    device: str, far_memory: Tensor, norm: bool, far_dim: str
) -> None:
    sizes = {"tokens": (3, 2, 16), "heads": (2, 3, 16), "axis": (2, 2, 3)}[far_dim]
    strides = {"tokens": (FAR, 16, 1), "heads": (16, FAR, 1), "axis": (2, 1, FAR)}[far_dim]
    x = far_memory.as_strided(sizes, strides)
    near = random_values(sizes, torch.bfloat16, device)
    positions = random_positions((sizes[0], 1), device=device)
    options = {"rotary_dim": 2, "rotary_offset": 1} if far_dim == "axis" else {}
    expected = rotate(norm, near, positions, **options)
    x.copy_(near)
    assert_same_bits(rotate(norm, x, positions, **options), expected)
    rotate_(norm, x, positions, **options)
    assert_same_bits(x, expected)


# Of dimensions of one element, any stride is allowed: their products overflow 32 and 64 bits.
HUGE = (2**31, 2**40, 2**62)


def with_huge_strides(x: Tensor, dims: int) -> Tensor:
    """Returns a view of x with a dimension of one element before each of the first dimensions."""
    sizes, strides = list(x.shape), list(x.stride())
    for dim in reversed(range(dims)):
        sizes.insert(dim, 1)
        strides.insert(dim, HUGE[dim % len(HUGE)])
    return x.as_strided(sizes, strides)


@FORMS
@pytest.mark.parametrize("tables", [False, True], ids=["positions", "tables"])
@FAMILIES
def test_huge_strides_on_little_memory(
    device: str, norm: bool, tables: bool, in_place: bool
) -> None:
    q = random_values((3, 5, 16), device=device)
    k = random_values((3, 2, 16), device=device, seed=1)
    weight = random_values((16,), device=device, seed=2)
    far_q, far_k, far_weight = (with_huge_strides(one, 2) for one in (q, k, weight[None, None]))
    if tables:
        angles = tuple(random_values((3, 1, 8), device=device, seed=seed) for seed in (3, 4))
        far_angles = tuple(with_huge_strides(one, 2) for one in angles)
    else:
        # Of one axis, so that inv_freq has two dimensions.
        angles = random_positions((1, 3, 1), device=device), random_inv_freq((1, 8), device=device)
        far_angles = (
            with_huge_strides(angles[0][0], 2).unsqueeze(0),
            angles[1].as_strided((1, 8), (2**62, 1)),
        )
    name = f"{'norm_' if norm else ''}apply{'_cos_sin' if tables else ''}"
    function = getattr(torch_rope, name)
    weights = ((weight, None),) if norm else ()
    far_weights = ((far_weight, None),) if norm else ()
    expected = function((q, k), *weights, *angles)
    if in_place:
        function = getattr(torch_rope, f"{name}_")
    actual = function((far_q, far_k), *far_weights, *far_angles)
    for result, other in zip(actual, expected, strict=True):
        assert_same_bits(result.reshape(other.shape), other)


# --------------------------------------------------------------------------------------------------
# Very many rows, and very long ones


@pytest.mark.parametrize("shape", [(100_000, 1, 2, 32), (100_000, 2, 1, 32)], ids=["BSHD", "BHSD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FORMS
@FAMILIES
def test_a_batch_of_100000_with_one_token(
    device: str, norm: bool, in_place: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = random_values(shape, dtype, device)
    some = torch.tensor([0, 1, 31_000, 65_535, 65_536, 99_998, 99_999], device=device)
    copy = x[some]
    positions = random_positions((100_000, 1, 1), device=device)
    actual = (rotate_ if in_place else rotate)(norm, x, positions)
    assert_same_bits(actual[some], rotate(norm, copy, positions[some]))
    assert bool((actual[:, ..., 0] != 0).all())  # All of them were written.
    weight = (None,) if norm else ()
    exact = (reference.norm_apply if norm else reference.apply)(copy, *weight, positions[some])
    assert_rotated(actual[some], exact)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@FORMS
@FAMILIES
@CONVENTIONS
def test_one_head_of_8192(
    device: str, norm: bool, interleaved: bool, in_place: bool, dtype: torch.dtype
) -> None:
    x = random_values((3, 1, 8192), dtype, device)
    positions = random_positions((3, 1), device=device)
    weight = (None,) if norm else ()
    exact = (reference.norm_apply if norm else reference.apply)(
        x, *weight, positions, interleaved=interleaved
    )
    actual = (rotate_ if in_place else rotate)(norm, x, positions, interleaved=interleaved)
    assert_rotated(actual, exact)


# --------------------------------------------------------------------------------------------------
# Nothing

OPERATORS = ("apply", "apply_cos_sin", "norm_apply", "norm_apply_cos_sin")


def arguments_of(
    name: str, size: tuple[int, ...], rows: bool, device: str
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Returns weight and angles for x of shape (B, S, H, D), of the sizes that it has."""
    batch, tokens, heads, axis = size
    weight = (random_values((heads, axis), device=device),) if name.startswith("norm") else ()
    if not name.endswith("cos_sin"):
        positions = random_positions((batch, tokens, 1), device=device)
        return weight, (positions, random_inv_freq((axis // 2,), device=device))
    shape = (batch, tokens, 1, axis // 2)
    if not rows:
        return weight, (random_values(shape, device=device), random_values(shape, device=device))
    table = random_values((tokens, axis // 2), device=device)
    of_tokens = torch.arange(tokens, device=device).unsqueeze(-1)
    return weight, (table, table, of_tokens)


@pytest.mark.parametrize("rows", [False, True], ids=["direct", "rows"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("zeros", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_any_size_may_be_zero(device: str, zeros: tuple[bool, ...], name: str, rows: bool) -> None:
    size = tuple(0 if zero else full for zero, full in zip(zeros, (2, 3, 4, 8), strict=True))
    assert len(size) == 4
    x = torch.empty(size, device=device)
    weight, angles = arguments_of(name, size, rows, device)
    function: Callable[..., Any] = getattr(torch_rope, name)
    in_place: Callable[..., Any] = getattr(torch_rope, f"{name}_")
    norm = bool(weight)
    axes = {"norm_axes": (-2, -1)} if norm else {}
    pair_weights = ((weight[0], None),) if norm else ()
    for options in ({}, axes):
        leaf = x.clone().requires_grad_()
        result = function(leaf, *weight, *angles, **options)
        assert result.shape == x.shape
        assert result.stride() == torch.empty_like(x).stride()
        (gradient,) = torch.autograd.grad(result.sum(), leaf)
        assert gradient.shape == x.shape
        pair = function((x, x), *pair_weights, *angles, **options)
        assert [one.shape for one in pair] == [x.shape] * 2
        assert in_place(x, *weight, *angles, **options) is x
        assert in_place((x, x.clone()), *pair_weights, *angles, **options)[0] is x


@pytest.mark.parametrize("name", OPERATORS)
def test_the_gradients_of_nothing_are_zero(device: str, name: str) -> None:
    weight, angles = arguments_of(name, (2, 3, 4, 8), False, device)
    x = torch.empty(2, 3, 0, 8, device=device)
    if weight:
        weight = (torch.ones(8, device=device),)
    leaves = [
        one.requires_grad_()
        for one in (*weight, *angles)
        if one is not None and one.is_floating_point()
    ]
    result = getattr(torch_rope, name)(x, *weight, *angles)
    for leaf, gradient in zip(leaves, torch.autograd.grad(result.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize("name", OPERATORS)
def test_a_slice_of_nothing_leaves_every_element(device: str, name: str) -> None:
    x = random_values((3, 2, 8), device=device)
    weight = (None,) if name.startswith("norm") else ()
    empty = torch.empty(3, 1, 0, device=device)
    angles = (empty, empty) if name.endswith("cos_sin") else (torch.tensor(5, device=device),)
    options = {} if name.endswith("cos_sin") else {"rotary_dim": 0}
    actual = getattr(torch_rope, name)(x, *weight, *angles, **options)
    if not weight:
        assert_same_bits(actual, x)
    else:
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=0)


def test_a_table_of_no_rows_serves_no_tokens(device: str) -> None:
    table = torch.empty(0, 4, device=device)
    x = torch.empty(0, 2, 8, device=device)
    rows = torch.empty(0, 1, dtype=torch.int64, device=device)
    assert torch_rope.apply_cos_sin(x, table, table, rows).shape == x.shape
