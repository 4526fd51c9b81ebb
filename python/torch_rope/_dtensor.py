"""The sharding strategy for DTensor: which shards of the tensors of a call belong together.

Every process normalizes and rotates its shard of x. Only an x that is sharded along the embedding
axis, or along another axis of the norm, is redistributed; the gradient of its output, weights,
positions, frequencies and tables are redistributed to match x. Importing this module registers the
strategy.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeGuard

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor.placement_types import _StridedShard
from torch.fx.experimental.symbolic_shapes import guard_or_false

# The tensors of a call that belong to x or q, and those that belong to k.
_GROUPS = (("x", "q", "grad", "grad_q", "weight", "q_weight"), ("k", "grad_k", "k_weight"))
_ROTATED = ("x", "q", "k")
_GRADIENTS = ("grad", "grad_q", "grad_k")
_WEIGHTS = ("weight", "q_weight", "k_weight")


class _Operand(NamedTuple):
    """A tensor of a call.

    Attributes:
        name: The argument's name.
        spec: How it is placed.
        dims: Its dimensions that broadcast with those of the other tensors, rightmost first.
        group: 0 if it belongs to x or q, 1 if it belongs to k, None for what makes the angles.
        shared: Indices into dims along which elements share a mean.
    """

    name: str
    spec: DTensorSpec
    dims: list[int]
    group: int | None
    shared: frozenset[int] = frozenset()

    def varies_along(self, index: int) -> bool:
        """Whether it has more than one element along the dimension with this index."""
        if index >= len(self.dims):
            return False
        return not guard_or_false(self.spec.shape[self.dims[index]] == 1)


def _operands(schema: OpSchema) -> list[_Operand]:
    """Returns the tensors of a call, in the order of the schema."""
    arguments = schema.op._schema.arguments
    specs = {
        argument.name: strategy.strategies[0].output_spec
        for argument, strategy in zip(arguments, schema.args_schema, strict=False)
        if isinstance(strategy, OpStrategy)
    }
    axis = schema.kwargs_schema.get("embedding_axis", -1)
    norm_axes = schema.kwargs_schema.get("norm_axes") or ()
    assert isinstance(axis, int)
    assert isinstance(norm_axes, (list, tuple))

    operands = []
    for name, spec in specs.items():
        dims = list(reversed(range(spec.ndim)))
        group = next((i for i, names in enumerate(_GROUPS) if name in names), None)
        shared: frozenset[int] = frozenset()
        if name in _ROTATED + _GRADIENTS:
            dims.remove(axis % spec.ndim)
            means = {norm_axis % spec.ndim for norm_axis in norm_axes}
            shared = frozenset(index for index, dim in enumerate(dims) if dim in means)
        elif name in _WEIGHTS:
            dims.remove(spec.ndim - 1)
        elif name == "positions":
            if "inv_freq" in specs and specs["inv_freq"].ndim == 2:
                dims.remove(0)
        elif name == "inv_freq" or "positions" in specs:
            dims = []  # frequencies, and tables of rows
        else:
            dims.remove(spec.ndim - 1)
        operands.append(_Operand(name, spec, dims, group, shared))
    return operands


def _is_sharded(placement: Placement) -> TypeGuard[Shard | _StridedShard]:
    return isinstance(placement, (Shard, _StridedShard))


def _is_sum(placement: Placement) -> bool:
    return type(placement) is Partial and placement.reduce_op in ("sum", "avg")


def _kept(operand: _Operand, mesh_dim: int, *, is_linear: bool) -> Placement:
    """Returns the placement of a rotated tensor if it can stay, else Replicate."""
    placement = operand.spec.placements[mesh_dim]
    if _is_sharded(placement):
        is_free = placement.dim in operand.dims
        is_free = is_free and operand.dims.index(placement.dim) not in operand.shared
        return placement if is_free else Replicate()
    return placement if is_linear and _is_sum(placement) else Replicate()


def _placements(operands: list[_Operand], mesh_dim: int, *, is_linear: bool) -> list[Placement]:
    """Returns the placement of each tensor along one dimension of the mesh.

    Args:
        operands: The tensors.
        mesh_dim: The dimension of the mesh.
        is_linear: Whether the results are linear in what is rotated, as without a norm.
    """
    rotated = {one.group: one for one in operands if one.name in _ROTATED}
    kept = {group: _kept(one, mesh_dim, is_linear=is_linear) for group, one in rotated.items()}
    for group, placement in kept.items():
        if not _is_sharded(placement):
            continue
        index = rotated[group].dims.index(placement.dim)
        if any(one.group is None and one.varies_along(index) for one in operands):
            # The angles go with it, and so must everything else.
            if any(index in one.shared for one in rotated.values()):
                return [Replicate()] * len(operands)
            return [_shard_along(placement, one, index) for one in operands]
    return [_placement_beside(one, rotated, kept, mesh_dim) for one in operands]


def _placement_beside(
    operand: _Operand,
    rotated: Mapping[int | None, _Operand],
    kept: Mapping[int | None, Placement],
    mesh_dim: int,
) -> Placement:
    """Returns the placement of a tensor where what is rotated is placed independently of angles."""
    if operand.group is None:
        return Replicate()
    placement = kept[operand.group]
    if _is_sharded(placement) and operand.name not in _ROTATED:
        index = rotated[operand.group].dims.index(placement.dim)
        return _shard_along(placement, operand, index)
    if operand.name in _GRADIENTS and _is_sum(operand.spec.placements[mesh_dim]):
        return operand.spec.placements[mesh_dim]  # A backward pass is linear in gradients.
    return placement


def _shard_along(placement: Placement, operand: _Operand, index: int) -> Placement:
    """Returns the shard ``placement`` for the matching dimension of another tensor."""
    is_weight = operand.name in _WEIGHTS
    if index >= len(operand.dims) or (is_weight and not operand.varies_along(index)):
        return Replicate()
    if isinstance(placement, _StridedShard):
        return _StridedShard(operand.dims[index], split_factor=placement.split_factor)
    return Shard(operand.dims[index])


def _strategy(schema: OpSchema) -> OpStrategy:
    """Returns the only strategy for a call."""
    operands = _operands(schema)
    inputs = _input_specs(schema, operands, is_linear="norm" not in schema.op._schema.name)
    rotated = [one for one in operands if one.name in _ROTATED]
    specs = [inputs[one.name] for one in rotated]
    in_order = [inputs[one.name] for one in operands]
    if schema.is_inplace_op():
        for operand, spec in zip(rotated, specs, strict=True):
            if operand.spec.placements != spec.placements:
                raise NotImplementedError(
                    f"{schema.op._schema.name}(): expected {operand.name} to be placed as "
                    f"{spec.placements}, since a call in place moves no data between processes, "
                    f"but got {operand.spec.placements}"
                )
        return OpStrategy([OpSpec(None, in_order)])
    return OpStrategy([OpSpec(specs[0] if len(specs) == 1 else tuple(specs), in_order)])


def _input_specs(
    schema: OpSchema, operands: list[_Operand], *, is_linear: bool
) -> dict[str, DTensorSpec]:
    """Returns how each tensor must be placed, by its name."""
    mesh = schema.get_mesh_from_args()
    columns = [_placements(operands, dim, is_linear=is_linear) for dim in range(mesh.ndim)]
    return {
        operand.name: DTensorSpec(mesh, placements, tensor_meta=operand.spec.tensor_meta)
        for operand, placements in zip(operands, zip(*columns, strict=True), strict=True)
    }


def _backward_strategy(schema: OpSchema) -> OpStrategy:
    """Returns the only strategy for the gradients of what is normalized and of its weights."""
    operands = _operands(schema)
    inputs = _input_specs(schema, operands, is_linear=False)
    groups = 2 if "k" in inputs else 1
    mask = schema.kwargs_schema.get("output_mask", [True] * 4)
    assert isinstance(mask, (list, tuple))
    outputs: list[DTensorSpec | None] = []
    for names in (_GRADIENTS, _WEIGHTS):
        for group in range(groups):
            name = next((name for name in names if name in _GROUPS[group] and name in inputs), None)
            is_wanted = mask[len(outputs) if groups == 2 else 2 * len(outputs)]
            if name is None or not is_wanted:
                outputs.append(None)
            elif names is _GRADIENTS:
                outputs.append(inputs[name])
            else:
                gradient = next(
                    inputs[one] for one in _GRADIENTS if one in _GROUPS[group] and one in inputs
                )
                outputs.append(_sum_to_weight(inputs[name], gradient))
    return OpStrategy([OpSpec(tuple(outputs), [inputs[one.name] for one in operands])])


def _sum_to_weight(weight: DTensorSpec, gradient: DTensorSpec) -> DTensorSpec:
    """Returns the placement of a weight's gradient: a sum over what the weight broadcasts along."""
    placements = [
        of_weight
        if _is_sharded(of_weight)
        else Partial()
        if _is_sharded(of_gradient)
        else of_gradient
        for of_weight, of_gradient in zip(weight.placements, gradient.placements, strict=True)
    ]
    return DTensorSpec(weight.mesh, tuple(placements), tensor_meta=weight.tensor_meta)


_INFO = RuntimeSchemaInfo(static_kwargkey=["embedding_axis", "norm_axes", "output_mask"])


def _register(name: str, strategy: Callable[[OpSchema], OpStrategy]) -> None:
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
        getattr(torch.ops.rope, name).default, strategy, _INFO
    )


for _family in ("apply", "apply_cos_sin", "norm_apply", "norm_apply_cos_sin"):
    for _suffix in ("", "_qk", "_", "_qk_"):
        _register(_family + _suffix, _strategy)
for _family in ("norm_apply", "norm_apply_cos_sin"):
    for _suffix in ("", "_qk"):
        _register(f"_{_family}{_suffix}_backward", _backward_strategy)
