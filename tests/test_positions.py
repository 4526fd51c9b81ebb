"""Positions of packed, padded, shared and gridded tokens."""

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
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


CU_SEQLENS = "rope::positions_from_cu_seqlens(): expected cu_seqlens to "


@pytest.mark.parametrize(
    ("cu_seqlens", "total_length", "message"),
    [
        ([0, 5, 3], 5, "ascend, but got 3 after 5"),
        ([0, 3, 5], 4, "end at or before total_length = 4, but got 5"),
        ([0, 1], 0, "end at or before total_length = 0, but got 1"),
        ([3, 5], 5, "begin with 0, but got 3"),
        ([-1, 5], 5, "begin with 0, but got -1"),
        ([0, -1], 5, "ascend, but got -1 after 0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("step", [1, 2])
def test_cu_seqlens_on_cpu_ascend_from_0_to_at_most_the_total_length(
    cu_seqlens: list[int], total_length: int, message: str, dtype: torch.dtype, step: int
) -> None:
    given = torch.tensor(cu_seqlens, dtype=dtype).repeat_interleave(step)[::step]
    with pytest.raises(ValueError, match=f"^{re.escape(CU_SEQLENS + message)}$"):
        torch_rope.positions_from_cu_seqlens(given, total_length)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 1)])
def test_cu_seqlens_of_another_shape_are_refused(device: str, shape: tuple[int, ...]) -> None:
    message = f"{CU_SEQLENS}have the shape (B + 1), one number more than sequences, but got "
    message += str(list(shape))
    for place in (device, "meta"):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            torch_rope.positions_from_cu_seqlens(
                torch.zeros(shape, dtype=torch.int32, device=place), 5
            )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.bool, torch.int8]
)
def test_cu_seqlens_of_another_dtype_are_refused(device: str, dtype: torch.dtype) -> None:
    message = f"{CU_SEQLENS}be int32 or int64, but got {str(dtype).removeprefix('torch.')}"
    for place in (device, "meta"):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            torch_rope.positions_from_cu_seqlens(torch.tensor([0, 1], dtype=dtype, device=place), 1)


@pytest.mark.parametrize(
    ("cu_seqlens", "kind"), [([0, 3, 5], "list"), (np.array([0, 3, 5]), "ndarray"), (None, "None")]
)
def test_cu_seqlens_are_a_tensor(cu_seqlens: Any, kind: str) -> None:
    message = f"{CU_SEQLENS}be a tensor, but got {kind}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        torch_rope.positions_from_cu_seqlens(cu_seqlens, 5)


def test_a_total_length_is_an_integer_of_at_least_0(device: str) -> None:
    expected = r"^rope::positions_from_cu_seqlens\(\): expected total_length to "
    for place in (device, "meta"):
        cu_seqlens = torch.tensor([0, 3, 5], device=place)
        with pytest.raises(ValueError, match=f"{expected}be at least 0, but got -2$"):
            torch_rope.positions_from_cu_seqlens(cu_seqlens, -2)
        for total_length, kind in ((5.0, "float"), (cu_seqlens[-1], "Tensor"), (None, "None")):
            with pytest.raises(TypeError, match=f"{expected}be an integer, but got {kind}$"):
                torch_rope.positions_from_cu_seqlens(cu_seqlens, total_length)  # type: ignore[arg-type]


def test_a_batch_of_cu_seqlens_is_numbered_without_a_look_at_its_values(device: str) -> None:
    cu_seqlens = torch.tensor([[0, 2, 5], [0, 3, 4], [0, 5, 3]], device=device)
    actual = torch.vmap(lambda row: torch_rope.positions_from_cu_seqlens(row, 5))(cu_seqlens)
    assert actual[:2].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]


def test_a_compiled_program_numbers_whatever_it_is_given(device: str) -> None:
    number = torch.compile(
        lambda ends: torch_rope.positions_from_cu_seqlens(ends, 5),
        fullgraph=True,
        backend="aot_eager",
    )
    assert number(torch.tensor([0, 3, 5], device=device)).tolist() == [0, 1, 2, 0, 1]
    number(torch.tensor([0, 5, 3], device=device))  # Not read, and no error.


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("mask", "padded", "packed"),
    [
        ([[1, 1, 2, 2, 2, 0]], [[0, 1, 2, 3, 4, 4]], [[0, 1, 0, 1, 2, 0]]),
        ([[0, 0, 7, 7, 3]], [[0, 0, 0, 1, 2]], [[0, 0, 0, 1, 0]]),
        # Padding between runs, of one number or of two.
        ([[0, 1, 1, 0, 0, 1, 1, 0]], [[0, 0, 1, 1, 1, 2, 3, 3]], [[0, 0, 1, 0, 0, 0, 1, 0]]),
        ([[1, 0, 2, 2, 0, 3]], [[0, 0, 1, 2, 2, 3]], [[0, 0, 0, 1, 0, 0]]),
        # A first number that is also the last.
        ([[1, 1, 2, 1, 1, 1]], [[0, 1, 2, 3, 4, 5]], [[0, 1, 0, 0, 1, 2]]),
        ([5, 5, 0], [0, 1, 1], [0, 1, 0]),
        ([4], [0], [0]),
        (
            [[[1, 2], [0, 0]], [[2, 2], [0, 1]]],
            [[[0, 1], [0, 0]], [[0, 1], [0, 0]]],
            [[[0, 0], [0, 0]], [[0, 1], [0, 0]]],
        ),
    ],
)
def test_a_mask_may_number_the_samples_of_a_row(
    device: str, dtype: torch.dtype, mask: list[Any], padded: list[Any], packed: list[Any]
) -> None:
    number = torch_rope.positions_from_attention_mask
    attention_mask = torch.tensor(mask, dtype=dtype, device=device)
    assert number(attention_mask).tolist() == padded
    actual = number(attention_mask, packed=True)
    assert actual.dtype == torch.int64
    assert actual.tolist() == packed


@pytest.mark.parametrize("packed", [False, True])
def test_any_number_but_0_is_a_token(device: str, packed: bool) -> None:
    mask = torch.tensor([[-1, -1, -1, 0], [2**40, 2**40, 0, 0]], device=device)
    actual = torch_rope.positions_from_attention_mask(mask, packed)
    assert actual.tolist() == [
        [0, 1, 2, 0 if packed else 2],
        [0, 1, *([0, 0] if packed else [1, 1])],
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_a_mask_without_elements_gives_no_positions(
    device: str, shape: tuple[int, ...], packed: bool
) -> None:
    mask = torch.zeros(shape, dtype=torch.int64, device=device)
    assert torch_rope.positions_from_attention_mask(mask, packed).shape == shape


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dimension", [0, 1])
def test_masks_are_numbered_under_vmap_without_a_loop(
    device: str, packed: bool, dimension: int
) -> None:
    def number(mask: Tensor) -> Tensor:
        return torch_rope.positions_from_attention_mask(mask, packed)

    masks = torch.tensor([[[1, 1, 2], [0, 1, 1]], [[1, 2, 2], [5, 5, 5]]], device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of a loop.
        actual = torch.vmap(number, in_dims=dimension, out_dims=dimension)(masks)
    assert torch.equal(actual, number(masks))


@pytest.mark.parametrize(
    "mask",
    [
        [[float("-inf"), 0.0, 0.0]],
        [[0.0, 1.0, 1.0]],
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.complex64),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_that_is_not_of_integers_is_refused(device: str, mask: Any, packed: bool) -> None:
    attention_mask = torch.as_tensor(mask, device=device)
    dtype = str(attention_mask.dtype).removeprefix("torch.")
    message = (
        r"^rope::positions_from_attention_mask\(\): expected attention_mask to be bool or an "
        f"integer dtype, but got {dtype}$"
    )
    for place in (device, "meta"):
        with pytest.raises(TypeError, match=message):
            torch_rope.positions_from_attention_mask(attention_mask.to(place), packed)


def test_a_mask_has_a_dimension(device: str) -> None:
    message = "expected attention_mask to have at least 1 dimension, but got 0$"
    with pytest.raises(ValueError, match=message):
        torch_rope.positions_from_attention_mask(torch.tensor(True, device=device))


@pytest.mark.parametrize(
    ("mask", "packed", "message"),
    [
        (np.ones(3, dtype=bool), False, "attention_mask to be a tensor, but got ndarray"),
        ([1, 1], False, "attention_mask to be a tensor, but got list"),
        (torch.ones(3, dtype=torch.bool), 1, "packed to be a bool, but got int"),
    ],
)
def test_a_mask_is_a_tensor_and_packed_a_bool(mask: Any, packed: Any, message: str) -> None:
    match = rf"^rope::positions_from_attention_mask\(\): expected {message}$"
    with pytest.raises(TypeError, match=match):
        torch_rope.positions_from_attention_mask(mask, packed)


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
        ((-8, 0, 4), "expected seq_len to be at least 0 and a multiple of 8, but got -8"),
        ((16, 0, 0), "expected world_size to be at least 1, but got 0"),
        ((16, -3, -2), "expected world_size to be at least 1, but got -2"),
    ],
)
def test_ranks_that_cannot_share_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch_rope.context_parallel_positions(*arguments, zigzag=True)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((16.0, 0, 4), {}, "seq_len to be an integer, but got float"),
        ((16, None, 4), {}, "rank to be an integer, but got None"),
        ((16, 0, "4"), {}, "world_size to be an integer, but got str"),
        ((16, 0, True), {}, "world_size to be an integer, but got bool"),
        ((16, 0, 4), {"zigzag": "no"}, "zigzag to be a bool, but got str"),
    ],
)
def test_ranks_are_integers(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    match = rf"^rope::context_parallel_positions\(\): expected {message}$"
    with pytest.raises(TypeError, match=match):
        torch_rope.context_parallel_positions(*arguments, **options)


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
        torch_rope.positions_from_attention_mask(mask.to(place), packed=True)
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
            torch_rope.positions_from_attention_mask(mask, packed=True),
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
        arguments = (
            torch.tensor([0, 2, 5], device=device),
            torch.ones(2, tokens, dtype=torch.bool, device=device),
        )
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
    opcheck(ops._positions_from_cu_seqlens.default, (torch.tensor([0, 2, 5], device=device), 6))
    opcheck(ops._positions_from_attention_mask.default, (mask,))
    opcheck(ops._positions_from_attention_mask.default, (mask, True))
    opcheck(ops._context_parallel_positions.default, (8, 1, 2, True, place))
    opcheck(ops._grid_positions.default, ((2, 3), place))


def test_a_grid_without_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected sizes to have an element for each axis"):
        torch_rope.grid_positions(())


@pytest.mark.parametrize(("sizes", "size"), [((-1, 2), -1), ((2, -3), -3)])
def test_a_negative_size_of_a_grid_is_refused(sizes: tuple[int, ...], size: int) -> None:
    message = rf"^rope::grid_positions\(\): expected sizes to be at least 0, but got {size}$"
    with pytest.raises(ValueError, match=message):
        torch_rope.grid_positions(sizes)


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        (14, "int"),
        ("14", "str"),
        (None, "None"),
        (torch.tensor([2, 3]), "Tensor"),
        ((2.0, 3), "a tuple with float"),
        ([2, (3, 4)], "a list with tuple"),
    ],
)
def test_sizes_of_a_grid_are_integers(sizes: Any, kind: str) -> None:
    message = (
        rf"^rope::grid_positions\(\): expected sizes to be a sequence of integers, but got {kind}$"
    )
    with pytest.raises(TypeError, match=message):
        torch_rope.grid_positions(sizes)


# ---- Every helper ----


def test_integers_of_numpy_are_integers() -> None:
    two, four = np.int64(2), np.int32(4)
    grid: Tensor = torch_rope.grid_positions((two, 3))
    assert grid.shape == (2, 2, 3)
    assert torch_rope.context_parallel_positions(four, np.int8(1), two).tolist() == [2, 3]


def test_helpers_are_traced_by_fx() -> None:
    def run(cu_seqlens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        rows, tokens = mask.shape[0], mask.shape[1]
        return (
            torch_rope.positions_from_cu_seqlens(cu_seqlens, tokens),
            torch_rope.positions_from_attention_mask(mask),
            torch_rope.positions_from_attention_mask(mask, packed=True),
            torch_rope.context_parallel_positions(tokens, 1, 2),
            torch_rope.grid_positions((rows, tokens)),
            torch_rope.permute_half_to_interleaved(cu_seqlens, 4),
        )

    arguments = torch.tensor([0, 2, 5, 6]), torch.tensor([[1, 1, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1]])
    traced = torch.fx.symbolic_trace(run)
    for actual, expected in zip(traced(*arguments), run(*arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_helpers_without_keywords_of_their_own_are_scripted() -> None:
    def run(cu_seqlens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch_rope.positions_from_cu_seqlens(cu_seqlens, mask.size(-1)),
            torch_rope.positions_from_attention_mask(mask, packed=True),
        )

    arguments = torch.tensor([0, 2, 5]), torch.tensor([1, 1, 2, 2, 0])
    for actual, expected in zip(torch.jit.script(run)(*arguments), run(*arguments), strict=True):
        assert torch.equal(actual, expected)
