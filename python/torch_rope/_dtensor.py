"""The sharding strategy for DTensor: which shards of x, positions and tables belong together.

Every process rotates its shard of x. Only an x that is sharded along the embedding axis is
redistributed; positions, frequencies and tables, which are smaller, are redistributed to match x.
Importing this module registers the strategy.
"""

from typing import NamedTuple, TypeGuard

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor.placement_types import _StridedShard
from torch.fx.experimental.symbolic_shapes import guard_or_false


class _Operand(NamedTuple):
    """A tensor of a call.

    Attributes:
        name: The argument's name.
        spec: How it is placed.
        dims: Its dimensions that broadcast with those of the other tensors, rightmost first.
        is_rotated: Whether it is x, q or k.
    """

    name: str
    spec: DTensorSpec
    dims: list[int]
    is_rotated: bool


def _operands(schema: OpSchema) -> list[_Operand]:
    """Returns the tensors of a call, in the order of the schema."""
    arguments = schema.op._schema.arguments
    specs = {
        argument.name: strategy.strategies[0].output_spec
        for argument, strategy in zip(arguments, schema.args_schema, strict=False)
        if isinstance(strategy, OpStrategy)
    }
    axis = schema.kwargs_schema.get("embedding_axis", -1)
    assert isinstance(axis, int)

    operands = []
    for name, spec in specs.items():
        dims = list(reversed(range(spec.ndim)))
        is_rotated = name in ("x", "q", "k")
        if is_rotated:
            dims.remove(axis % spec.ndim)
        elif name == "positions":
            if "inv_freq" in specs and specs["inv_freq"].ndim == 2:
                dims.remove(0)
        elif name == "inv_freq" or "positions" in specs:
            dims = []  # frequencies, and tables of rows
        else:
            dims.remove(spec.ndim - 1)
        operands.append(_Operand(name, spec, dims, is_rotated))
    return operands


def _is_sharded(placement: Placement) -> TypeGuard[Shard | _StridedShard]:
    return isinstance(placement, (Shard, _StridedShard))


def _kept(operand: _Operand, mesh_dim: int) -> Placement:
    """Returns the placement of a rotated tensor if it can stay, else Replicate."""
    placement = operand.spec.placements[mesh_dim]
    if _is_sharded(placement):
        return placement if placement.dim in operand.dims else Replicate()
    # Rotation is linear in x.
    if type(placement) is Partial and placement.reduce_op in ("sum", "avg"):
        return placement
    return Replicate()


def _placements(operands: list[_Operand], mesh_dim: int) -> list[Placement]:
    """Returns the placement of each tensor along one dimension of the mesh."""
    kept = [_kept(operand, mesh_dim) for operand in operands if operand.is_rotated]
    varying = {
        index
        for operand in operands
        if not operand.is_rotated
        for index, dim in enumerate(operand.dims)
        if not guard_or_false(operand.spec.shape[dim] == 1)
    }
    for operand, placement in zip(operands, kept, strict=False):
        if _is_sharded(placement):
            index = operand.dims.index(placement.dim)
            if index in varying:
                return [_shard_along(placement, other, index) for other in operands]
    return kept + [Replicate()] * (len(operands) - len(kept))


def _shard_along(placement: Placement, operand: _Operand, index: int) -> Placement:
    """Returns the shard ``placement`` for the matching dimension of another tensor."""
    if index >= len(operand.dims):
        return Replicate()
    if isinstance(placement, _StridedShard):
        return _StridedShard(operand.dims[index], split_factor=placement.split_factor)
    return Shard(operand.dims[index])


def _strategy(schema: OpSchema) -> OpStrategy:
    """Returns the only strategy for a call."""
    operands = _operands(schema)
    mesh = schema.get_mesh_from_args()
    columns = [_placements(operands, mesh_dim) for mesh_dim in range(mesh.ndim)]
    inputs = [
        DTensorSpec(mesh, placements, tensor_meta=operand.spec.tensor_meta)
        for operand, placements in zip(operands, zip(*columns, strict=True), strict=True)
    ]
    rotated = [spec for operand, spec in zip(operands, inputs, strict=True) if operand.is_rotated]
    if schema.is_inplace_op():
        for operand, spec in zip(operands, rotated, strict=False):
            if operand.spec.placements != spec.placements:
                raise NotImplementedError(
                    f"{schema.op._schema.name}(): expected {operand.name} to be placed as "
                    f"{spec.placements}, since a call in place moves no data between processes, "
                    f"but got {operand.spec.placements}"
                )
        return OpStrategy([OpSpec(None, inputs)])
    return OpStrategy([OpSpec(rotated[0] if len(rotated) == 1 else tuple(rotated), inputs)])


for _name in ("apply", "apply_cos_sin"):
    for _suffix in ("", "_qk", "_", "_qk_"):
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
            getattr(torch.ops.rope, _name + _suffix).default,
            _strategy,
            RuntimeSchemaInfo(static_kwargkey=["embedding_axis"]),
        )
