"""DTensor: every placement gives the result of one process, and x stays placed as it was."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_rope
from attention import Attention, batches, train
from processes import Processes
from reference import random_inv_freq, random_positions, random_values
from torch import Tensor, nn

if not torch.distributed.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication, local_map
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

REPLICATE = Replicate()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Processes]:
    """Processes that are the same for all tests of this file."""
    group = Processes(request.param, tmp_path_factory.mktemp("processes"))
    yield group
    group.stop()


# --------------------------------------------------------------------------------------------------
# What the processes run


@cache
def mesh_of(*shape: int) -> DeviceMesh:
    """Returns the mesh of a shape; without one, all processes in a row."""
    return init_device_mesh("cpu", shape or (torch.distributed.get_world_size(),))


def meshes() -> list[DeviceMesh]:
    """Returns a mesh of one dimension, and one of two where there are processes enough."""
    is_large = torch.distributed.get_world_size() == 4
    return [mesh_of(), mesh_of(2, 2)] if is_large else [mesh_of()]


# Not an operator of ours: view and index_put of DTensors that are sharded.
needs_newer_dtensor = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="DTensor of torch 2.11 cannot flatten a sharded dimension"
)


def place(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """Distributes a tensor that every process has, without communication.

    Partial sums are the tensor times 2, -1, 1, -1, ...: multiples that add up to it exactly.
    """
    whole = [REPLICATE if isinstance(p, Partial) else p for p in placements]
    local = distribute_tensor(tensor.clone(), mesh, whole, src_data_rank=None).to_local()
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Partial):
            rank = mesh.get_local_rank(mesh_dim)
            local = local * (2 if rank == 0 else -1 if rank % 2 else 1)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def replicate(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Gives every process the whole tensor."""
    return place(tensor, mesh, *[REPLICATE] * mesh.ndim)


def assert_equal(actual: Any, expected: Tensor) -> None:
    """Asserts that a DTensor holds exactly the elements of a tensor that every process has."""
    assert isinstance(actual, DTensor)
    torch.testing.assert_close(actual.full_tensor(), expected, rtol=0, atol=0)


def assert_close(actual: Any, expected: Tensor) -> None:
    """Asserts that a DTensor holds the elements of a tensor, but for the order of sums."""
    assert isinstance(actual, DTensor)
    torch.testing.assert_close(actual.full_tensor(), expected)


# --------------------------------------------------------------------------------------------------
# Calls of every form. Of the sizes, some are odd: not all processes get as much, or anything.

B, S, H, D, N = 3, 6, 4, 8, 4


@dataclass(frozen=True)
class Form:
    """A call of an operator: the shapes of its tensors, and its options."""

    rotated: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...] | None
    inv_freq: tuple[int, ...] | None = None
    tables: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: tuple[tuple[int, ...] | None, ...] = ()

    def xs(self) -> list[Tensor]:
        """Returns x, or q and k."""
        return [
            random_values(shape, torch.float64, seed=seed)
            for seed, shape in enumerate(self.rotated)
        ]

    def angles(self) -> list[Tensor | None]:
        """Returns the other tensors, in the order of the operator."""
        weights = [
            None if shape is None else random_values(shape, torch.float64, seed=seed)
            for seed, shape in enumerate(self.weights, 5)
        ]
        dtype = torch.int64 if self.tables else torch.float64
        limits = {"low": 0, "high": self.tables[0]} if self.tables else {}
        positions = None
        if self.positions is not None:
            positions = random_positions(self.positions, dtype, **limits)
        if self.tables is None:
            inv_freq = random_inv_freq(self.inv_freq) if self.inv_freq else None
            return [*weights, positions, inv_freq]
        return [
            *weights,
            *(random_values(self.tables, torch.float64, seed=seed) for seed in (3, 4)),
            positions,
        ]

    def call(self, xs: Sequence[Tensor], angles: Sequence[Tensor | None]) -> list[Tensor]:
        """Calls the functional operator, for one tensor or two."""
        result = self._function("")(*self._arguments(xs, angles), **self.options)
        return [result] if len(xs) == 1 else list(result)

    def call_in_place(self, xs: Sequence[Tensor], angles: Sequence[Tensor | None]) -> None:
        """Calls the operator in place, for one tensor or two."""
        self._function("_")(*self._arguments(xs, angles), **self.options)

    def _function(self, suffix: str) -> Callable[..., Any]:
        family = "apply_cos_sin" if self.tables else "apply"
        function: Callable[..., Any] = getattr(
            torch_rope, f"{'norm_' if self.weights else ''}{family}{suffix}"
        )
        return function

    def _arguments(self, xs: Sequence[Tensor], others: Sequence[Tensor | None]) -> list[Any]:
        weights, angles = others[: len(self.weights)], others[len(self.weights) :]
        if len(xs) == 1:
            return [xs[0], *weights, *angles]
        return [tuple(xs), *([tuple(weights)] if weights else []), *angles]

    def axis(self, x: Tensor) -> int:
        """Returns the embedding axis, not negative."""
        return int(self.options.get("embedding_axis", -1)) % x.dim()

    def whole_axes(self, x: Tensor) -> set[int]:
        """Returns the dimensions of x that one process must have whole."""
        return {self.axis(x), *(axis % x.dim() for axis in self.options.get("norm_axes", ()))}


FORMS = {
    "sequence before heads": Form(((B, S, H, D),), (S, 1)),
    "heads before sequence": Form(((B, H, S, D),), (S,), options={"embedding_axis": 3}),
    "positions of each sequence": Form(((B, S, H, D),), (B, S, 1), (N,)),
    "positions of each head": Form(((B, S, H, D),), (B, S, H), options={"interleaved": True}),
    "positions of one head for a batch": Form(((B, H, S, D),), (B, 1, S), (3,)),
    "several axes": Form(((B, S, H, D),), (2, B, S, 1), (2, N)),
    "several axes, embedding axis first": Form(
        ((D, B, S),), (2, S), (2, N), options={"embedding_axis": 0}
    ),
    "embedding axis in the middle": Form(((B, D, S),), (B, S), options={"embedding_axis": 1}),
    "negative embedding axis": Form(((B, D, S, H),), (S, 1), options={"embedding_axis": -3}),
    "one position": Form(((S, D),), ()),
    "tables": Form(((B, S, H, D),), None, None, (S, 1, N)),
    "tables of each sequence": Form(((B, H, S, D),), None, None, (B, 1, S, 3)),
    "tables, embedding axis in the middle": Form(
        ((B, D, S),), None, None, (S, N), {"embedding_axis": -2}
    ),
    "full-width tables": Form(
        ((B, S, H, D),), None, None, (S, 1, 2 * N), {"full_width": True, "rotary_dim": D}
    ),
    "pair with full-width tables by position": Form(
        ((B, S, 8, D), (B, S, 2, D)), (S, 1), None, (9, 2 * N), {"full_width": True}
    ),
    "table of one row": Form(((S, D),), None, None, (N,)),
    "tables by position": Form(((B, S, H, D),), (B, S, 1), None, (9, N)),
    "pair with grouped heads": Form(((B, S, 8, D), (B, S, 2, D)), (S, 1)),
    "pair with heads before sequence": Form(((B, 8, S, D), (B, 2, S, D)), (B, 1, S), (N,)),
    "pair of different rank": Form(((B, S, H, D), (S, 2, D)), (S, 1), (N,)),
    "pair of different rank, embedding axis in the middle": Form(
        ((B, 2, D, S), (D, S)), (S,), options={"embedding_axis": -2}
    ),
    "pair with tables": Form(((B, S, 8, D), (S, 2, D)), None, None, (S, 1, N)),
    "pair with tables by position": Form(((B, S, 8, D), (B, S, 2, D)), (S, 1), None, (9, N)),
}
NORMS = {
    "norm": Form(((B, S, H, D),), (S, 1), weights=((D,),)),
    "norm without a weight": Form(((B, H, S, D),), (S,), (N,), weights=(None,)),
    "norm with weights of each head": Form(
        ((B, S, H, D),), (B, S, 1), (N,), None, {"norm_last": True}, ((H, D),)
    ),
    "norm over heads": Form(
        ((B, S, H, D),), (S, 1), None, None, {"norm_axes": (-2, -1)}, ((H, D),)
    ),
    "norm over heads before the sequence": Form(
        ((B, H, S, D),), (2, S), (2, N), None, {"norm_axes": [3, 1]}, ((H, 1, D),)
    ),
    "norm along the axis in the middle": Form(
        ((B, D, S),), (S,), options={"embedding_axis": 1}, weights=((B, 1, D),)
    ),
    "norm with tables of each head": Form(
        ((B, S, H, D),), None, None, (S, H, N), {"norm_last": True}, ((S, 1, D),)
    ),
    "norm with rows of tables": Form(((B, S, H, D),), (B, S, 1), None, (9, N), weights=((D,),)),
    "norm over tokens": Form(
        ((B, S, H, D),), (S, 1), None, None, {"norm_axes": (1, -1)}, ((1, D),)
    ),
    "pair of norms": Form(
        ((B, S, 8, D), (B, S, 2, D)), (S, 1), weights=((8, D), (D,)), options={"eps": 0.1}
    ),
    "pair of norms of different rank over heads": Form(
        ((B, S, H, D), (S, 2, D)),
        None,
        None,
        (S, 1, N),
        {"norm_axes": (-2, -1), "norm_last": True},
        (None, (2, D)),
    ),
    "pair of norms over other axes": Form(
        ((2, D, S, H), (2, D, H)),
        (H,),
        options={"embedding_axis": 1, "norm_axes": (2, 1)},
        weights=(None, None),
    ),
}
FORMS |= NORMS
SINGLES = [name for name, form in FORMS.items() if len(form.rotated) == 1]
PAIRS = [name for name, form in FORMS.items() if len(form.rotated) == 2]


def placements_of(x: Tensor) -> list[Placement]:
    """Returns the ways to place a tensor along one dimension of a mesh."""
    return [REPLICATE, Partial(), *(Shard(dim) for dim in range(x.dim()))]


def placed_angles(angles: Sequence[Tensor | None], mesh: DeviceMesh) -> Iterator[list[Any]]:
    """Places what the angles are made of: replicated, and one of it in other ways."""
    replicated = [None if tensor is None else replicate(tensor, mesh) for tensor in angles]
    yield replicated
    for index, tensor in enumerate(angles):
        if tensor is not None:
            for placement in placements_of(tensor)[1:]:
                placed = place(tensor, mesh, *[placement] * mesh.ndim)
                yield [*replicated[:index], placed, *replicated[index + 1 :]]


def kept(form: Form, x: Tensor, placements: Sequence[Placement]) -> tuple[Placement, ...]:
    """Returns how the result of a call with one tensor must be placed."""
    gathered: list[Placement] = [Shard(axis) for axis in form.whole_axes(x)]
    if form.weights:
        gathered.append(Partial())  # A norm is not linear.
    return tuple(REPLICATE if p in gathered else p for p in placements)


def replicated_angles(form: Form, mesh: DeviceMesh) -> list[Any]:
    """Gives every process what the angles are made of."""
    return [None if tensor is None else replicate(tensor, mesh) for tensor in form.angles()]


def check_single(name: str) -> None:
    form = FORMS[name]
    x, angles = form.xs()[0], form.angles()
    (expected,) = form.call([x], angles)
    for mesh in meshes():
        placed_otherwise = [replicated_angles(form, mesh)]
        if mesh.ndim == 1:
            placed_otherwise += placed_angles(angles, mesh)
        for placements in product(placements_of(x), repeat=mesh.ndim):
            placed = place(x, mesh, *placements)
            for distributed in placed_otherwise:
                (result,) = form.call([placed], distributed)
                assert isinstance(result, DTensor)
                assert result.placements == kept(form, x, placements)
                assert result.stride() == expected.stride()
                assert_equal(result, expected)


@pytest.mark.parametrize("name", SINGLES)
def test_every_placement_gives_the_result_of_one_process(processes: Processes, name: str) -> None:
    processes.run(check_single, name)


def check_pair(name: str) -> None:
    form = FORMS[name]
    q, k = form.xs()
    expected = form.call([q, k], form.angles())
    for mesh in meshes():
        angles = replicated_angles(form, mesh)
        for of_q, of_k in product(placements_of(q), placements_of(k)):
            # Along the second dimension of a mesh the other way round: what is chosen for one
            # dimension must not depend on the other.
            placed_q = place(q, mesh, of_q, *[REPLICATE] * (mesh.ndim - 1))
            placed_k = place(k, mesh, *[REPLICATE] * (mesh.ndim - 1), of_k)
            for result, whole in zip(
                form.call([placed_q, placed_k], angles), expected, strict=True
            ):
                assert_equal(result, whole)


@pytest.mark.parametrize("name", PAIRS)
def test_every_placement_of_a_pair_gives_the_result_of_one_process(
    processes: Processes, name: str
) -> None:
    processes.run(check_pair, name)


def check_pair_stays() -> None:
    mesh = mesh_of()
    form = FORMS["pair of different rank"]
    q, k = form.xs()
    tokens, heads = (Shard(1), Shard(0)), (Shard(2), Shard(1))
    for placements in (
        (REPLICATE, REPLICATE),
        tokens,
        heads,
        (Shard(0), REPLICATE),
        (Shard(2), REPLICATE),
        (REPLICATE, heads[1]),
        (Partial(), heads[1]),
        (heads[0], Partial()),
    ):
        placed = [place(x, mesh, p) for x, p in zip((q, k), placements, strict=True)]
        results = form.call(placed, replicated_angles(form, mesh))
        assert [result.placements[0] for result in results] == list(placements)
    # Where one is sharded over tokens, so is the other.
    for placements in ((tokens[0], REPLICATE), (REPLICATE, tokens[1]), (tokens[0], heads[1])):
        placed = [place(x, mesh, p) for x, p in zip((q, k), placements, strict=True)]
        results = form.call(placed, replicated_angles(form, mesh))
        assert [result.placements[0] for result in results] == list(tokens)


def test_each_of_a_pair_stays_placed_where_positions_allow_it(processes: Processes) -> None:
    processes.run(check_pair_stays)


def copy_of(x: DTensor, *, requires_grad: bool) -> DTensor:
    """Returns a copy that is placed as x is. In torch 2.12 that of clone() adds up sums."""
    local = x.to_local().detach().requires_grad_(requires_grad).clone()
    return DTensor.from_local(
        local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def check_in_place(name: str) -> None:
    form = FORMS[name]
    xs = form.xs()
    expected = form.call(xs, form.angles())
    for mesh in meshes():
        angles = replicated_angles(form, mesh)
        for placements in product(*(placements_of(x) for x in xs)):
            placed = [place(x, mesh, *[p] * mesh.ndim) for x, p in zip(xs, placements, strict=True)]
            # What the functional form leaves as it is placed, the form in place can do.
            results = form.call(placed, angles)
            stays = [
                one.placements == other.placements
                for one, other in zip(placed, results, strict=True)
            ]
            # DTensor copies nothing into shards of which a process has none.
            is_empty_somewhere = any(
                isinstance(p, Shard) and x.shape[p.dim] < mesh.size()
                for x, p in zip(xs, placements, strict=True)
            )
            for grad in (False, True):
                if grad and form.weights and is_empty_somewhere:
                    continue  # A norm in place under autograd goes through a copy.
                rotated = [copy_of(x, requires_grad=grad) for x in placed]
                if all(stays):
                    form.call_in_place(rotated, angles)
                    values = expected
                elif form.weights and grad and Partial() not in placements:
                    form.call_in_place(rotated, angles)  # through a copy
                    values = expected
                elif form.weights and grad:
                    continue  # DTensor copies nothing into sums.
                else:
                    with pytest.raises(NotImplementedError, match="a call in place moves no data"):
                        form.call_in_place(rotated, angles)
                    values = xs
                for x, value, p in zip(rotated, values, placements, strict=True):
                    assert x.placements == (p,) * mesh.ndim
                    assert_equal(x.detach(), value)


@pytest.mark.parametrize(
    "name",
    [
        "sequence before heads",
        "embedding axis in the middle",
        "tables",
        "tables by position",
        "pair of different rank",
        "pair with tables by position",
        "norm over heads",
        "norm over tokens",
        "pair of norms",
        "pair of norms over other axes",
    ],
)
def test_in_place_each_process_rotates_what_it_has_or_nothing_changes(
    processes: Processes, name: str
) -> None:
    processes.run(check_in_place, name)


def check_partial_that_is_not_linear() -> None:
    mesh = mesh_of()
    rank = mesh.get_local_rank()
    x, positions = random_values((S, D), torch.float64), torch.arange(S)
    largest = DTensor.from_local(x - rank, mesh, [Partial("max")])
    result = torch_rope.apply(largest, replicate(positions, mesh))
    assert result.placements == (REPLICATE,)
    assert_equal(result, torch_rope.apply(x, positions))
    mean = DTensor.from_local(x + (rank if rank % 2 else -rank - 1), mesh, [Partial("avg")])
    result = torch_rope.apply(mean, replicate(positions, mesh))
    assert result.placements == (Partial("avg"),)
    average = mean.full_tensor()
    torch.testing.assert_close(result.full_tensor(), torch_rope.apply(average, positions))


def test_what_is_still_to_be_reduced_stays_so_only_if_the_reduction_is_linear(
    processes: Processes,
) -> None:
    processes.run(check_partial_that_is_not_linear)


def check_composed(name: str) -> None:
    form = FORMS[name]
    x, family = form.xs()[0], "apply_cos_sin" if form.tables else "apply"
    family = f"norm_{family}" if form.weights else family
    composed = getattr(torch.ops.rope, f"{family}_composed")
    (expected,) = form.call([x], form.angles())
    for placement in placements_of(x):
        angles = replicated_angles(form, mesh_of())
        result = composed(place(x, mesh_of(), placement), *angles, **form.options)
        assert_close(result, expected)


@pytest.mark.parametrize(
    "name",
    [
        "sequence before heads",
        "several axes",
        "tables by position",
        "norm over heads",
        "norm with tables of each head",
    ],
)
def test_the_composed_form_gives_the_result_of_one_process(processes: Processes, name: str) -> None:
    processes.run(check_composed, name)


def check_flattened_tokens() -> None:
    mesh = mesh_of()
    x, positions = random_values((B, 8, H, D), torch.float64), random_positions((B, 8, 1))
    expected = torch_rope.apply(x, positions).flatten(0, 1)
    # Each process has a piece of every sequence.
    flat = place(x, mesh, Shard(1)).flatten(0, 1)
    assert isinstance(flat.placements[0], _StridedShard)
    for placement in (REPLICATE, Shard(1)):
        result = torch_rope.apply(flat, place(positions, mesh, placement).flatten(0, 1))
        assert result.placements == flat.placements
        assert_equal(result, expected)


@needs_newer_dtensor
def test_tokens_that_were_flattened_stay_on_their_process(processes: Processes) -> None:
    processes.run(check_flattened_tokens)


def check_communication() -> None:
    mesh = mesh_of()
    x, positions = random_values((8, 8, 8, D)), torch.arange(8).unsqueeze(-1)

    def collectives(
        placement: Placement, of_positions: Placement, rotate: Callable[..., Any]
    ) -> int:
        x_placed = place(x, mesh, placement).requires_grad_()
        positions_placed = place(positions, mesh, of_positions)
        with CommDebugMode() as mode:
            result = rotate(x_placed, positions_placed)
            result.backward(result.detach())
        return mode.get_total_counts()

    def pair(x: Tensor, positions: Tensor) -> Tensor:
        return torch_rope.apply((x, x), positions)[1]

    for rotate in (torch_rope.apply, torch.ops.rope.apply, pair):
        for placement in (REPLICATE, Partial(), Shard(0), Shard(1), Shard(2)):
            assert collectives(placement, REPLICATE, rotate) == 0
        assert collectives(Shard(1), Shard(0), rotate) == 0
        assert collectives(Shard(3), REPLICATE, rotate) > 0


def test_processes_communicate_only_for_a_sharded_embedding_axis(processes: Processes) -> None:
    processes.run(check_communication)


# --------------------------------------------------------------------------------------------------
# Gradients


def gradients(
    form: Form, xs: Sequence[Tensor], angles: Sequence[Tensor | None], *, twice: bool = False
) -> list[Tensor]:
    """Returns the gradients of every floating-point tensor, or of the norm of those."""
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())
        for tensor in (*xs, *angles)
    ]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    results = form.call(leaves[: len(xs)], leaves[len(xs) :])  # type: ignore[arg-type]
    total = sum((result**3).sum() for result in results)
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, wanted, create_graph=twice)
    if twice:
        norm = sum((gradient**2).sum() for gradient in found)
        assert isinstance(norm, Tensor)
        found = torch.autograd.grad(norm, wanted)
    return list(found)


def check_gradients(name: str) -> None:
    form = FORMS[name]
    xs, angles = form.xs(), form.angles()
    once, again = (gradients(form, xs, angles, twice=twice) for twice in (False, True))
    mesh = mesh_of()
    for dim in range(-1, xs[0].dim()):
        # The dimensions are counted from the right, where q and k agree.
        placed = [
            place(x, mesh, Shard(dim + x.dim() - xs[0].dim()))
            if dim >= xs[0].dim() - x.dim()
            else replicate(x, mesh)
            for x in xs
        ]
        distributed = replicated_angles(form, mesh)
        for actual, expected in zip(gradients(form, placed, distributed), once, strict=True):
            assert_close(actual, expected)
        twice = gradients(form, placed, distributed, twice=True)
        for actual, expected in zip(twice, again, strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize(
    "name",
    [
        "sequence before heads",
        "positions of each sequence",
        "several axes",
        "tables",
        pytest.param("tables by position", marks=needs_newer_dtensor),
        "pair with heads before sequence",
        "pair of different rank",
        "pair of different rank, embedding axis in the middle",
        "pair with tables",
        *(name for name in NORMS if name != "norm with rows of tables"),
        pytest.param("norm with rows of tables", marks=needs_newer_dtensor),
    ],
)
def test_gradients_are_those_of_one_process(processes: Processes, name: str) -> None:
    processes.run(check_gradients, name)


def check_gradient_in_place() -> None:
    mesh = mesh_of()
    positions = torch.arange(S).unsqueeze(-1)

    def gradients_of(
        q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor
    ) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, inv_freq)]
        q, k = leaves[0] * 2, leaves[1] * 2
        torch_rope.apply_((q, k), positions)
        torch_rope.apply_(q, positions, leaves[2])
        return torch.autograd.grad((q**3).sum() + (k**3).sum(), leaves)

    q, k = random_values((B, S, 8, D), torch.float64), random_values((B, S, 4, D), torch.float64)
    inv_freq = random_inv_freq((N,))
    expected = gradients_of(q, k, positions, inv_freq)
    for placement in (REPLICATE, Shard(0), Shard(1), Shard(2)):
        actual = gradients_of(
            place(q, mesh, placement),
            place(k, mesh, placement),
            replicate(positions, mesh),
            replicate(inv_freq, mesh),
        )
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)


def test_gradients_of_calls_in_place_are_those_of_one_process(processes: Processes) -> None:
    processes.run(check_gradient_in_place)


def check_partial_gradient_of_a_norm() -> None:
    mesh = mesh_of()
    x, positions = random_values((S, D), torch.float64), torch.arange(S)
    weight, columns = (
        random_values((D, *size), torch.float64, seed=seed) for seed, size in ((1, ()), (2, (12,)))
    )

    def gradients_of(x: Tensor, weight: Tensor, positions: Tensor, columns: Tensor) -> Any:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        rotated = torch_rope.norm_apply(*leaves, positions)
        return torch.autograd.grad(((rotated @ columns) ** 2).sum(), leaves)

    expected = gradients_of(x, weight, positions, columns)
    # Each process has some of the columns: the gradient of what they multiply is a sum.
    whole = [replicate(tensor, mesh) for tensor in (x, weight, positions)]
    actual = gradients_of(*whole, place(columns, mesh, Shard(1)))
    for one, other in zip(actual, expected, strict=True):
        assert one.placements == (Partial(),)
        assert_close(one, other)


def test_the_gradients_of_a_norm_are_still_to_be_summed_where_that_of_its_result_is(
    processes: Processes,
) -> None:
    processes.run(check_partial_gradient_of_a_norm)


def check_placements_of_weight_gradients() -> None:
    mesh = mesh_of()
    positions = replicate(torch.arange(S).unsqueeze(-1), mesh)

    def placement(of_x: Placement, shape: tuple[int, ...], of_weight: Placement) -> Placement:
        x = place(random_values((B, S, H, D)), mesh, of_x).requires_grad_()
        weight = place(random_values(shape), mesh, of_weight).requires_grad_()
        torch_rope.norm_apply(x, weight, positions)
        with CommDebugMode() as mode:
            result = torch_rope.norm_apply(x, weight, positions)
            # As autograd calls it.
            found = torch.ops.rope._norm_apply_backward(
                result.detach(), x.detach(), weight.detach(), positions
            )
        assert found[0].placements == (of_x,)
        assert mode.get_total_counts() == 0
        return found[1].placements[0]

    # Of each process's part, without communication.
    assert placement(Shard(2), (H, D), Shard(0)) == Shard(0)
    assert placement(Shard(2), (D,), REPLICATE) == Partial()
    assert placement(Shard(2), (1, D), REPLICATE) == Partial()
    assert placement(Shard(1), (H, D), REPLICATE) == Partial()
    assert placement(Shard(1), (S, 1, D), Shard(0)) == Shard(0)
    assert placement(Shard(0), (D,), REPLICATE) == Partial()
    assert placement(REPLICATE, (D,), REPLICATE) == REPLICATE


def test_the_gradient_of_a_weight_is_a_sum_over_processes(processes: Processes) -> None:
    processes.run(check_placements_of_weight_gradients)


def check_wanted_gradients() -> None:
    mesh = mesh_of()
    positions = replicate(torch.arange(S).unsqueeze(-1), mesh)
    q, k, grad_q, grad_k = (
        place(random_values((S, 2, D), torch.float64, seed=seed), mesh, Shard(0))
        for seed in range(4)
    )
    q_weight, k_weight = (replicate(random_values((D,), torch.float64), mesh) for _ in range(2))
    backward = torch.ops.rope._norm_apply_qk_backward
    for weights in ((q_weight, k_weight), (None, k_weight), (None, None)):
        tensors = grad_q, grad_k, q, k, *weights, positions
        for mask in product((False, True), repeat=4):
            found = backward(*tensors, output_mask=mask)
            given = True, True, *(weight is not None for weight in weights)
            for one, wanted, exists in zip(found, mask, given, strict=True):
                assert isinstance(one, DTensor) == (wanted and exists)


def test_only_wanted_gradients_are_computed(processes: Processes) -> None:
    processes.run(check_wanted_gradients)


def check_partial_gradient() -> None:
    mesh = mesh_of()
    x, positions = random_values((S, D), torch.float64), torch.arange(S)
    weight = random_values((D, 12), torch.float64, seed=1)

    def gradient_of(x: Tensor, positions: Tensor, weight: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        rotated = torch_rope.apply(x, positions)
        return torch.autograd.grad(((rotated @ weight) ** 2).sum(), x)[0]

    expected = gradient_of(x, positions, weight)
    # Each process has some columns of the weight, so that the gradient of what they multiply is a
    # sum over the processes.
    actual = gradient_of(
        replicate(x, mesh), replicate(positions, mesh), place(weight, mesh, Shard(1))
    )
    assert isinstance(actual, DTensor)
    assert actual.placements == (Partial(),)
    assert_close(actual, expected)


def test_a_gradient_that_is_still_to_be_summed_is_rotated_as_it_is(processes: Processes) -> None:
    processes.run(check_partial_gradient)


# --------------------------------------------------------------------------------------------------
# Compilers


def check_compiled() -> None:
    positions, inv_freq = torch.arange(S, dtype=torch.float64).unsqueeze(-1), random_inv_freq((N,))
    xs = [random_values((B, S, heads, D), torch.float64, seed=heads) for heads in (H, 2 * H)]

    def rotate(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, ...]:
        q, k = torch_rope.apply((q, k), positions)
        return torch_rope.apply_(q * 2, positions, inv_freq), k.sin()

    def with_gradients(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        results = function(*leaves)
        total = sum((result**3).sum() for result in results)
        return [*results, *torch.autograd.grad(total, leaves)]

    def normalize(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, ...]:
        weights = inv_freq.repeat(2), None
        return torch_rope.norm_apply((q, k), weights, positions, inv_freq, norm_axes=(-2, -1))

    for function in (rotate, normalize):
        check_compiled_function(function, [*xs, positions, inv_freq], with_gradients)


def check_compiled_function(
    function: Callable[..., Any], tensors: list[Tensor], with_gradients: Callable[..., Any]
) -> None:
    mesh = mesh_of()
    *xs, positions, inv_freq = tensors
    expected = with_gradients(function, tensors)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for placement in (Shard(1), Shard(3)):  # tokens, and what is gathered
        placed = [place(x, mesh, placement) for x in xs]
        angles = [replicate(tensor, mesh) for tensor in (positions, inv_freq)]
        results = with_gradients(compiled, [*placed, *angles])
        for actual, one in zip(results, expected, strict=True):
            assert_close(actual, one)


# Each process compiles: the time that takes is not worth spending on more of them.
@pytest.mark.parametrize("processes", [2], ids=["2 processes"], indirect=True)
def test_a_compiled_function_of_dtensors_gives_what_one_process_gives(
    processes: Processes,
) -> None:
    processes.run(check_compiled)


# --------------------------------------------------------------------------------------------------
# Layers


def check_tensor_parallel() -> None:
    mesh = mesh_of()
    alone, layer, initial = (Attention(learned=True, dtype=torch.float64) for _ in range(3))
    # Each process has some of the heads. They share the frequencies, which learn from all.
    columns, heads = ColwiseParallel(use_local_output=False), [Shard(2)]
    plan = {"q": columns, "k": columns, "v": columns, "out": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)
    distribute_module(layer.rotary, mesh)
    layer.attend = local_map(  # type: ignore[method-assign]
        layer.attend, out_placements=heads, in_placements=(heads,) * 3, device_mesh=mesh
    )

    expected = train(alone, batches(dtype=torch.float64))
    with implicit_replication():  # for positions
        losses = train(layer, batches(dtype=torch.float64))
    # The frequencies are float32, and so is what the processes sum for them.
    assert losses == pytest.approx(expected, rel=1e-7)
    for actual, one, before in zip(
        layer.parameters(), alone.parameters(), initial.parameters(), strict=True
    ):
        assert_close(actual, one.detach())
        assert not torch.allclose(one, before, rtol=1e-4)


def test_a_tensor_parallel_layer_trains_to_the_losses_of_one_process(
    processes: Processes,
) -> None:
    processes.run(check_tensor_parallel)


def check_zigzag() -> None:
    mesh = mesh_of()
    rank, size = mesh.get_local_rank(), mesh.size()
    length = 4 * size
    shares = [
        torch_rope.context_parallel_positions(length, one, size, zigzag=True) for one in range(size)
    ]
    mine, order = shares[rank], torch.cat(shares)
    q, k, v, upstream = (
        random_values((B, length, H, D), torch.float64, seed=seed) for seed in range(4)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        mask = rows.unsqueeze(-1) >= columns
        return nn.functional.scaled_dot_product_attention(*heads, mask).transpose(1, 2)

    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    tokens = torch.arange(length)
    whole = attend(*torch_rope.apply((q, k), tokens.unsqueeze(-1)), v, tokens, tokens)
    expected = [whole.detach(), *torch.autograd.grad(whole, leaves, upstream)]

    placed = [place(leaf.detach()[:, order], mesh, Shard(1)).requires_grad_() for leaf in leaves]
    positions = DTensor.from_local(mine.unsqueeze(-1), mesh, [Shard(0)])
    with CommDebugMode() as mode:
        rotated = torch_rope.apply((placed[0], placed[1]), positions)
    assert mode.get_total_counts() == 0
    # The queries of a process meet the keys of all.
    gathered = [
        tensor.redistribute(mesh, [REPLICATE]).to_local(grad_placements=[Partial()])
        for tensor in (rotated[1], placed[2])
    ]
    share = attend(rotated[0].to_local(), *gathered, mine, order)
    result = DTensor.from_local(share, mesh, [Shard(1)])
    gradients = torch.autograd.grad(result, placed, place(upstream[:, order], mesh, Shard(1)))
    for actual, one in zip([result, *gradients], expected, strict=True):
        assert_close(actual, one[:, order])


def test_context_in_zigzag_order_attends_as_one_process_does(processes: Processes) -> None:
    processes.run(check_zigzag)


# --------------------------------------------------------------------------------------------------
# The order of imports

IMPORT_LATER = """
import sys, torch, torch_rope

assert "torch.distributed.tensor" not in sys.modules
torch.distributed.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

mesh = init_device_mesh("cpu", (1,))
with torch.inference_mode({inference}):
    place = lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])
    x, positions = torch.ones(3, 8), torch.arange(3)
    result = {function}(place(x), place(positions))
    assert isinstance(result, DTensor)
    assert torch.equal(result.full_tensor(), torch_rope.apply(x, positions))
"""


@pytest.mark.parametrize(
    ("function", "inference"),
    [
        ("torch_rope.apply", False),
        ("torch_rope.apply", True),
        ("torch.compile(torch_rope.apply, backend='aot_eager', fullgraph=True)", False),
    ],
    ids=["eager", "inference mode", "compiled"],
)
def test_dtensor_can_be_imported_after_the_package(
    tmp_path: Path, function: str, inference: bool
) -> None:
    program = IMPORT_LATER.format(file=tmp_path / "store", function=function, inference=inference)
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def test_the_operators_of_torch_can_be_called_where_dtensor_was_imported_before(
    tmp_path: Path,
) -> None:
    program = IMPORT_LATER.format(
        file=tmp_path / "store", function="torch.ops.rope.apply", inference=False
    ).replace(
        "import sys, torch, torch_rope", "import sys, torch, torch.distributed.tensor, torch_rope"
    )
    program = program.replace('assert "torch.distributed.tensor" not in sys.modules', "")
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


# --------------------------------------------------------------------------------------------------
# Tensors that are no DTensors


def check_plain_beside_dtensor() -> None:
    mesh = mesh_of()
    x, positions = random_values((B, S, H, D)), torch.arange(S).unsqueeze(-1)
    inv_freq = random_inv_freq((N,), torch.float32)
    placed = place(x, mesh, Shard(1))
    for arguments in ((positions, None), (replicate(positions, mesh), inv_freq)):
        with pytest.raises(RuntimeError, match=r"rope.apply.* got mixed torch.Tensor and DTensor"):
            torch_rope.apply(placed, *arguments)
    with implicit_replication():
        result = torch_rope.apply(placed, positions, inv_freq)
    assert_equal(result, torch_rope.apply(x, positions, inv_freq))


def test_plain_positions_beside_dtensors_are_an_error_but_for_implicit_replication(
    processes: Processes,
) -> None:
    processes.run(check_plain_beside_dtensor)


def check_message() -> None:
    x = place(random_values((B, S, H, D)), mesh_of(), Shard(1))
    positions = replicate(torch.arange(S), mesh_of())
    # The sizes are those of the whole tensors.
    with pytest.raises((ValueError, RuntimeError), match=r"apply\(\): .*\[3, 6, 4\].*got \[6\]"):
        torch_rope.apply(x, positions)


def test_errors_tell_the_sizes_of_the_whole_tensors(processes: Processes) -> None:
    processes.run(check_message)
