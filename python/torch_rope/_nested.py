"""Nested tensors with the jagged layout: the operators are called on their values.

The values have the dimensions of the nested tensor without the batch; their ragged dimension holds
the tokens of all sequences. Positions, tables and weights are nested in the same way, or dense with
a ragged dimension of size 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_torch_dispatch
from torch.nested._internal.nested_tensor import NestedTensor


class _Target:
    """A nested tensor without its embedding axis: the other tensors broadcast with it.

    Attributes:
        x: The nested tensor.
        rank: The number of its dimensions without the axis.
        ragged: The index of the ragged dimension among them.
    """

    def __init__(
        self, name: str, x: NestedTensor, axis: int, norm_axes: Sequence[int] | None
    ) -> None:
        """Checks the axes; the operator's name is for messages."""
        rank, ragged = x.dim(), x._ragged_idx
        if not -rank <= axis < rank:
            raise IndexError(
                f"{name}(): expected embedding_axis to be in [{-rank}, {rank - 1}] for the "
                f"dimensions of a nested tensor, but got {axis}"
            )
        if axis % rank in (0, ragged):
            raise NotImplementedError(
                f"{name}(): expected embedding_axis to be neither the batch nor the ragged "
                f"dimension of a nested tensor, but got {axis}"
            )
        for norm_axis in norm_axes or ():
            if not -rank <= norm_axis < rank:
                raise IndexError(
                    f"{name}(): expected norm_axes to be in [{-rank}, {rank - 1}] for the "
                    f"dimensions of a nested tensor, but got {list(norm_axes or ())}"
                )
            if norm_axis % rank in (0, ragged):
                raise NotImplementedError(
                    f"{name}(): expected norm_axes to contain neither the batch nor the ragged "
                    f"dimension of a nested tensor, but got {list(norm_axes or ())}"
                )
        self.name = name
        self.x = x
        self.rank = rank - 1
        self.ragged = ragged if ragged < axis % rank else ragged - 1

    def is_like(self, other: "_Target") -> bool:
        """Whether the same positions and tables broadcast with the values of both."""
        same_place = self.rank - self.ragged == other.rank - other.ragged
        return same_place and _same_tokens(self.x, other.x)

    def fit(self, argument: str, tensor: Tensor, *, leading: int = 0, trailing: int = 0) -> Tensor:
        """Converts a tensor that broadcasts with x to one that broadcasts with the values.

        Args:
            argument: The name of the argument, for messages.
            tensor: Positions, a table or a weight.
            leading: The number of its dimensions before those that broadcast.
            trailing: The number after them.
        """
        rank = tensor.dim() - leading - trailing
        if isinstance(tensor, NestedTensor):
            if leading:
                raise NotImplementedError(
                    f"{self.name}(): expected {argument} to be dense where inv_freq has two "
                    "dimensions, but got a nested tensor. The values() of nested tensors can be "
                    "rotated instead"
                )
            same_dims = (rank, tensor._ragged_idx) == (self.rank, self.ragged)
            if not (same_dims and _same_tokens(tensor, self.x)):
                raise self.misfit(
                    argument,
                    tensor,
                    " and to share its offsets, as "
                    "torch.nested.nested_tensor_from_jagged(values, x.offsets()) does",
                )
            return _values(tensor)

        if rank > self.rank:
            raise self.misfit(argument, tensor)
        ragged = leading + rank - (self.rank - self.ragged)
        if ragged >= leading and tensor.shape[ragged] != 1:
            raise self.misfit(argument, tensor, " and to have a ragged dimension of size 1")
        if rank < self.rank:
            return tensor
        if tensor.shape[leading] == 1:
            return tensor.squeeze(leading)
        if tensor.shape[leading] != self.x.shape[0]:
            raise self.misfit(argument, tensor)
        # One entry per sequence: repeat it for each of its tokens, in the ragged dimension.
        tokens = tensor.squeeze(ragged).index_select(leading, _sequences(self.x))
        return tokens.movedim(leading, ragged - 1)

    def misfit(self, argument: str, tensor: Tensor, rule: str = "") -> ValueError:
        """Returns the error for a tensor that does not broadcast with x."""
        return ValueError(
            f"{self.name}(): expected {argument} to be broadcastable with the shape of the nested "
            f"tensor without embedding_axis{rule}, but got {tuple(tensor.shape)} for a nested "
            f"tensor of shape {tuple(self.x.shape)}"
        )


def _values(x: NestedTensor) -> Tensor:
    """Returns the values, differentiably."""
    values: Tensor = x.values()  # type: ignore[no-untyped-call]
    return values


def _inner(x: Tensor) -> Tensor:
    """Returns the buffer of a nested tensor; a dense tensor itself."""
    return x._values if isinstance(x, NestedTensor) else x


def _same_tokens(a: NestedTensor, b: NestedTensor) -> bool:
    """Whether both share offsets, and lengths if any: their values hold the same tokens."""
    if a._lengths is None and b._lengths is None:
        return bool(a.shape[a._ragged_idx] == b.shape[b._ragged_idx])
    return a._lengths is b._lengths and a._offsets is b._offsets


def _sequences(x: NestedTensor) -> Tensor:
    """Returns the index of the sequence of each token in the values."""
    tokens = torch.arange(x._values.shape[x._ragged_idx - 1], device=x.device)
    return torch.bucketize(tokens, x._offsets[1:-1], right=True)


def _fit(target: _Target, angles: Sequence[Any]) -> Sequence[Any]:
    """Converts positions and frequencies, or tables, to broadcast with the values."""
    if "cos_sin" not in target.name:
        positions, inv_freq = (*angles, None)[:2]
        axes = 0 if inv_freq is None else inv_freq.dim() - 1
        return [target.fit("positions", positions, leading=axes), inv_freq]
    cos, sin, positions = (*angles, None)[:3]
    if positions is not None:
        return [cos, sin, target.fit("positions", positions)]
    return [target.fit("cos", cos, trailing=1), target.fit("sin", sin, trailing=1)]


def _nest(values: Tensor, x: NestedTensor) -> Tensor:
    """Returns values nested like x."""
    nested: Tensor = torch._nested_view_from_jagged(
        values,
        x._offsets,
        x,
        x._lengths,
        x._ragged_idx,
        x._min_seqlen_tensor,
        x._max_seqlen_tensor,
    )
    return nested


class _Arguments:
    """The tensors of a call.

    Attributes:
        rotated: The tensors to rotate.
        weights: Their weights, one for each or None; empty where the operator has none.
        angles: Positions and frequencies, or tables and positions.
    """

    def __init__(self, name: str, arguments: Sequence[Any]) -> None:
        """Splits the positional arguments of an operator."""
        count = 2 if "_qk" in name else 1
        num_weights = count if "norm" in name else 0
        self.rotated = arguments[:count]
        self.weights = arguments[count : count + num_weights]
        self.angles = arguments[count + num_weights :]

    def of_each(self) -> list[Sequence[Any]]:
        """Returns the arguments of a call for each of the rotated tensors."""
        weights: list[tuple[Any, ...]] = [(weight,) for weight in self.weights]
        weights = weights or [()] * len(self.rotated)
        return [(x, *weight, *self.angles) for x, weight in zip(self.rotated, weights, strict=True)]

    def others(self) -> list[Tensor]:
        """Returns the tensors that are not rotated."""
        return [one for one in (*self.weights, *self.angles) if one is not None]


def _rotate(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Calls an operator on the values of nested tensors."""
    name: str = operator._schema.name
    given = _Arguments(name, arguments)
    rotated = given.rotated
    axis, norm_axes = options.pop("embedding_axis", -1), options.pop("norm_axes", None)
    _check(name, given)

    targets = [_Target(name, x, axis, norm_axes) for x in rotated if isinstance(x, NestedTensor)]
    if len(targets) < len(rotated) or not all(targets[0].is_like(target) for target in targets):
        # One call each: their positions convert differently, or do not fit both.
        for target in targets:
            _fit(target, given.angles)
        single = name.removeprefix("rope::").removesuffix("_").removesuffix("_qk")
        options = {**options, "embedding_axis": axis}
        if norm_axes is not None:
            options["norm_axes"] = norm_axes
        rotate = partial(getattr(torch.ops.rope, single).default, **options)
        results = tuple(rotate(*one) for one in given.of_each())
        if not name.endswith("_"):
            return results
        # Nothing is written before both have passed the checks.
        _check_memory(operator, rotated)
        for x, result in zip(map(_inner, rotated), map(_inner, results), strict=True):
            x.copy_(result)
        return None

    # The values lack the batch dimension: nonnegative axes shift by one.
    options["embedding_axis"] = axis if axis < 0 else axis - 1
    if norm_axes is not None:
        options["norm_axes"] = [axis if axis < 0 else axis - 1 for axis in norm_axes]
    weights = _fit_weights(targets, given.weights)
    fitting = (*weights, *_fit(targets[0], given.angles))
    if name.endswith("_"):
        # To a compiler values() returns a new tensor, which would hide the mutation.
        operator(*map(_inner, rotated), *fitting, **options)
        return None
    outputs = operator(*map(_values, rotated), *fitting, **options)
    if len(rotated) == 1:
        return _nest(outputs, rotated[0])
    return tuple(map(_nest, outputs, rotated))


def _fit_weights(
    targets: Sequence[_Target], weights: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Converts the weight of each target to broadcast with its values."""
    names = ("weight",) if len(targets) == 1 else ("q_weight", "k_weight")
    return [
        None if weight is None else target.fit(name, weight, trailing=1)
        for name, target, weight in zip(names, targets, weights, strict=False)
    ]


def _check_memory(operator: Any, pair: Sequence[Tensor]) -> None:
    """Raises if two tensors overlap, by a call in place that rotates zero columns."""
    q, k = (_inner(x).detach() for x in pair)
    if type(q) is Tensor and type(k) is Tensor:  # not while a compiler traces
        name = operator._schema.name.removeprefix("rope::")
        sizes = ((0,), (0,)) if "cos_sin" in name else ((), (0,))
        angles = (q.new_zeros(size, dtype=torch.float64) for size in sizes)
        rotation = name.removeprefix("norm_")  # A norm would change all elements.
        try:
            getattr(torch.ops.rope, rotation)(q, k, *angles)
        except ValueError as error:
            raise ValueError(str(error).replace(f"rope::{rotation}(", f"rope::{name}(")) from None


def _check(name: str, given: _Arguments) -> None:
    """Raises for calls that cannot be expressed in the values."""
    tensors = [*given.rotated, *given.others()]
    if any(tensor.is_nested and not isinstance(tensor, NestedTensor) for tensor in tensors):
        raise NotImplementedError(
            f"{name}(): expected nested tensors to have the layout torch.jagged, but got "
            f"torch.strided"
        )
    dense = [x for x in given.rotated if not x.is_nested]
    if dense and any(isinstance(tensor, NestedTensor) for tensor in given.others()):
        raise NotImplementedError(
            f"{name}(): expected what is rotated to be nested where weights, positions or tables "
            f"are, but got a tensor of shape {tuple(dense[0].shape)}"
        )
    holes = any(isinstance(x, NestedTensor) and x._lengths is not None for x in given.rotated)
    if holes and name.endswith("_"):
        raise NotImplementedError(
            f"{name}(): expected nested tensors without holes, since what lies in holes would be "
            "rotated too, but got one with lengths"
        )


def _dispatch(
    _class: type,
    operator: Any,
    _types: Any,
    arguments: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
) -> Any:
    """Implements ``__torch_dispatch__`` of nested tensors for an operator."""
    return _rotate(operator, *arguments, **(options or {}))


def _above_autograd(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Makes the conversion of the other tensors to values visible to autograd."""
    name: str = operator._schema.name
    given = _Arguments(name, arguments)
    _check(name, given)
    if "norm" in name or any(tensor.requires_grad for tensor in given.others()):
        # The conversion must be differentiated too. A norm saves the values in any case.
        return _rotate(operator, *arguments, **options)
    # Only the operator: differentiating values() would save an activation.
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE_AUTOGRAD):
        return operator(*arguments, **options)


_ABOVE_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradNestedTensor)

_library = Library("rope", "IMPL")  # type: ignore[no-untyped-call]
for _family in ("apply", "apply_cos_sin", "norm_apply", "norm_apply_cos_sin"):
    for _suffix in ("", "_qk", "_", "_qk_"):
        register_torch_dispatch(f"rope::{_family}{_suffix}", NestedTensor, _dispatch)
    for _suffix in ("", "_qk"):
        _operator = getattr(torch.ops.rope, _family + _suffix).default
        _function = partial(_above_autograd, _operator)
        _library.impl(_family + _suffix, _function, "AutogradNestedTensor")  # type: ignore[no-untyped-call]
