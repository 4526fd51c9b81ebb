"""Positions of packed, padded, shared and gridded tokens; weights between the pair conventions."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_values
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule
from torch.library import opcheck

# ---- Packed sequences ----


@pytest.mark.parametrize("lengths", [[3, 2], [1], [4, 0, 0, 3], [0, 5], [7, 1, 1, 8], [0]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_numbered_each_from_0(
    device: str, lengths: list[int], dtype: torch.dtype
) -> None:
    ends = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(ends, dtype=dtype, device=device)
    actual = torch_rope.positions_from_cu_seqlens(cu_seqlens, ends[-1])
    assert actual.dtype == dtype
    assert actual.device.type == device
    assert actual.tolist() == [i for length in lengths for i in range(length)]


def test_tokens_beyond_the_last_sequence_are_numbered_as_one_more(device: str) -> None:
    cu_seqlens = torch.tensor([0, 2, 5], device=device)
    actual = torch_rope.positions_from_cu_seqlens(cu_seqlens, 8)
    assert actual.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]


def test_packed_sequences_rotate_as_they_do_alone(device: str) -> None:
    lengths = (4, 1, 6)
    sequences = [random_values((n, 2, 32), device=device, seed=n) for n in lengths]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    positions = torch_rope.positions_from_cu_seqlens(cu_seqlens, sum(lengths)).unsqueeze(-1)
    packed = torch_rope.apply(torch.cat(sequences), positions)
    alone = [torch_rope.apply(x, torch.arange(len(x), device=device)[:, None]) for x in sequences]
    assert_same_bits(packed, torch.cat(alone))


# ---- Padded sequences ----


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[0, 0, 1, 1], [1, 1, 1, 1]], [[0, 0, 0, 1], [0, 1, 2, 3]]),
        ([[1, 1, 0, 0], [1, 0, 0, 0]], [[0, 1, 1, 1], [0, 0, 0, 0]]),
        ([[0, 0, 0]], [[0, 0, 0]]),
        ([0, 1, 1], [0, 0, 1]),
    ],
)
def test_padded_sequences_are_numbered_from_their_first_token(
    device: str, dtype: torch.dtype, mask: list[Any], expected: list[Any]
) -> None:
    attention_mask = torch.tensor(mask, dtype=dtype, device=device)
    actual = torch_rope.positions_from_attention_mask(attention_mask)
    assert actual.dtype == torch.int64
    assert actual.tolist() == expected


# ---- Context parallel ----


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("zigzag", [False, True])
def test_ranks_share_all_positions_equally(device: str, world_size: int, zigzag: bool) -> None:
    seq_len = 48
    shares = [
        torch_rope.context_parallel_positions(
            seq_len, rank, world_size, zigzag=zigzag, device=device
        )
        for rank in range(world_size)
    ]
    assert all(share.shape == (seq_len // world_size,) for share in shares)
    assert torch.cat(shares).sort().values.tolist() == list(range(seq_len))
    # With zigzag every rank has the same work under a causal mask.
    work = {int(share.sum()) for share in shares}
    assert len(work) == (1 if zigzag else world_size)


def test_a_rank_holds_a_chunk_or_one_from_the_front_and_one_from_the_back() -> None:
    positions = torch_rope.context_parallel_positions
    assert positions(16, 1, 4).tolist() == [4, 5, 6, 7]
    assert positions(16, 1, 4, zigzag=True).tolist() == [2, 3, 12, 13]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 4, 4), r"expected rank to be in \[0, 4\), but got 4"),
        ((16, -1, 4), r"expected rank to be in \[0, 4\), but got -1"),
        ((12, 0, 4), "expected seq_len to be at least 0 and a multiple of 8, but got 12"),
    ],
)
def test_ranks_that_cannot_share_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch_rope.context_parallel_positions(*arguments, zigzag=True)


# ---- Grids ----


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (2, 3, 4), (1, 5, 1), (0, 3)])
def test_places_of_a_grid_have_their_coordinates(device: str, sizes: tuple[int, ...]) -> None:
    actual = torch_rope.grid_positions(sizes, device=device)
    assert actual.shape == (len(sizes), *sizes)
    assert actual.device.type == device
    for place in itertools.product(*map(range, sizes)):
        assert actual[(slice(None), *place)].tolist() == list(place)


def test_an_image_turns_by_its_rows_and_columns(device: str) -> None:
    inv_freq = torch_rope.axial_frequencies((16, 16), device=device)
    patches = random_values((3, 4, 32), device=device)
    rotated = torch_rope.apply(patches, torch_rope.grid_positions((3, 4), device=device), inv_freq)
    options: dict[str, Any] = {"interleaved": True}
    pairs = torch_rope.permute_half_to_interleaved(patches.movedim(-1, 0), 32).movedim(0, -1)
    by_rows = torch_rope.apply(
        pairs, torch.arange(3, device=device)[:, None], inv_freq[0, :8].contiguous(), **options
    )
    by_both = torch_rope.apply(
        by_rows,
        torch.arange(4, device=device),
        inv_freq[1, 8:].contiguous(),
        rotary_offset=16,
        **options,
    )
    expected = torch_rope.permute_interleaved_to_half(by_both.movedim(-1, 0), 32).movedim(0, -1)
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-6)


def test_helpers_do_not_wait_for_the_device(device: str) -> None:
    """On CUDA a wait raises; on the meta device, which has no values, reading one would."""
    cu_seqlens = torch.tensor([0, 2, 5], device=device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)

    def run(place: str) -> None:
        torch_rope.positions_from_cu_seqlens(cu_seqlens.to(place), 5)
        torch_rope.positions_from_attention_mask(mask.to(place))
        torch_rope.context_parallel_positions(8, 1, 2, zigzag=True, device=place)
        torch_rope.grid_positions((2, 3), device=place)

    run("meta")
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(device)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_helpers_compile_to_one_graph_for_every_length(device: str) -> None:
    def run(cu_seqlens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        tokens = mask.shape[-1]
        return (
            torch_rope.positions_from_cu_seqlens(cu_seqlens, tokens),
            torch_rope.positions_from_attention_mask(mask),
            torch_rope.context_parallel_positions(2 * tokens, 1, 2, device=device),
            torch_rope.context_parallel_positions(4 * tokens, 1, 2, zigzag=True),
            torch_rope.grid_positions((tokens, 3), device=device),
            torch_rope.grid_positions((2, tokens)),
        )

    graphs = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=keep)
    for tokens in (5, 7, 12):
        arguments = torch.tensor([0, 2, 5], device=device), torch.ones(2, tokens, device=device)
        for actual, expected in zip(compiled(*arguments), run(*arguments), strict=True):
            assert torch.equal(actual, expected)
    assert len(graphs) == 1


def test_helpers_take_the_default_device_of_pytorch() -> None:
    with torch.device("meta"):
        assert torch_rope.grid_positions((2, 3)).is_meta
        assert torch_rope.context_parallel_positions(8, 1, 2).is_meta


def test_the_operators_behind_the_helpers_pass_opcheck(device: str) -> None:
    ops = torch.ops.rope
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=device)
    place = torch.device(device)
    weight = random_values((16, 3), device=device).requires_grad_()
    opcheck(ops._positions_from_cu_seqlens.default, (torch.tensor([0, 2, 5], device=device), 6))
    opcheck(ops._positions_from_attention_mask.default, (mask,))
    opcheck(ops._context_parallel_positions.default, (8, 1, 2, True, place))
    opcheck(ops._grid_positions.default, ((2, 3), place))
    opcheck(ops._permute_half_to_interleaved.default, (weight, 8, 4, 2))
    opcheck(ops._permute_interleaved_to_half.default, (weight, 8, None, 0))


def test_a_grid_without_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected sizes to have an element for each axis"):
        torch_rope.grid_positions(())


# ---- Weights ----

SLICES = [{}, {"rotary_dim": 4}, {"rotary_dim": 4, "rotary_offset": 2}, {"rotary_offset": 6}]


@pytest.mark.parametrize("options", SLICES)
@pytest.mark.parametrize("shape", [(24, 10), (24,), (24, 3, 2)])
def test_a_permutation_and_its_inverse_cancel(
    device: str, options: dict[str, int], shape: tuple[int, ...]
) -> None:
    weight = random_values(shape, device=device)
    there = torch_rope.permute_half_to_interleaved(weight, 8, **options)
    assert_same_bits(torch_rope.permute_interleaved_to_half(there, 8, **options), weight)
    back = torch_rope.permute_interleaved_to_half(weight, 8, **options)
    assert_same_bits(torch_rope.permute_half_to_interleaved(back, 8, **options), weight)


@pytest.mark.parametrize("options", SLICES)
def test_permuted_projections_give_the_same_scores(device: str, options: dict[str, int]) -> None:
    heads, head_dim, tokens = 3, 8, 5
    x = random_values((tokens, 10), torch.float64, device)
    positions = torch.arange(tokens, device=device).unsqueeze(-1)
    weights = [random_values((heads * head_dim, 10), x.dtype, device, seed=s) for s in (1, 2)]
    biases = [random_values((heads * head_dim,), x.dtype, device, seed=s) for s in (3, 4)]

    def scores(interleaved: bool) -> Tensor:
        permute = torch_rope.permute_half_to_interleaved
        rotated = []
        for weight, bias in zip(weights, biases, strict=True):
            if interleaved:
                weight = permute(weight, head_dim, **options)
                bias = permute(bias, head_dim, **options)
            projected = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (heads, head_dim))
            rotated.append(
                torch_rope.apply(projected, positions, interleaved=interleaved, **options)
            )
        return torch.einsum("qhd,khd->hqk", *rotated)

    torch.testing.assert_close(scores(True), scores(False), rtol=0, atol=1e-10)


def test_a_permutation_is_a_copy_and_differentiable() -> None:
    weight = random_values((16, 3)).requires_grad_()
    permuted = torch_rope.permute_half_to_interleaved(weight, 8)
    factors = random_values((16, 3), seed=1)
    (permuted * factors).sum().backward()
    assert_same_bits(weight.grad, torch_rope.permute_interleaved_to_half(factors, 8))


@pytest.mark.parametrize(
    ("head_dim", "options", "message"),
    [
        (7, {}, "expected weight to have a multiple of head_dim = 7 rows, but got shape .24, 10."),
        (0, {}, "expected weight to have a multiple of head_dim = 0 rows, but got shape .24, 10."),
        (8, {"rotary_dim": 3}, "expected rotary_dim to be even and at most 8 - rotary_offset"),
        (8, {"rotary_dim": 10}, "expected rotary_dim to be even and at most 8 - rotary_offset"),
        (
            8,
            {"rotary_dim": 8, "rotary_offset": 2},
            ".*but got rotary_dim = 8 and rotary_offset = 2",
        ),
        (8, {"rotary_offset": -2}, ".*but got rotary_dim = 10 and rotary_offset = -2"),
    ],
)
@pytest.mark.parametrize(
    "permute", [torch_rope.permute_half_to_interleaved, torch_rope.permute_interleaved_to_half]
)
def test_sizes_that_do_not_fit_are_refused(
    permute: Any, head_dim: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"rope::{permute.__name__}\(\): {message}"):
        permute(torch.zeros(24, 10), head_dim, **options)
