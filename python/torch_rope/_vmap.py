"""torch.vmap calls the kernel once for the whole batch.

Rotated tensors get the batch as their first dimension and the embedding as their last, as views.
Weights, positions and tables that are not mapped broadcast from the right unchanged. Mapped ones
get the batch first too, followed by dimensions of size 1 if a rotated tensor has more dimensions
than they. The axes of a norm move with the dimensions of the tensor.
The forms in place need no rule: under a transform they are the functional form and a copy.

The rules name the tensors they move. Every other argument of a schema, such as a new option,
reaches the operator unchanged; the tables for mapped frequencies raise TypeError for one they lack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import register_vmap

from torch_rope._arguments import message

# Where a tensor has the batch, if it has one.
Dim = int | None


class _Info(Protocol):
    """What PyTorch tells a rule about the map."""

    batch_size: int


@dataclass
class _Call:
    """A call of an operator under a map.

    Attributes:
        operator: The operator.
        batch_size: The size of the mapped dimension.
        tensors: The positional arguments by their names in the schema.
        dims: Where each of them has the batch.
        options: The keyword-only arguments that were given.
    """

    operator: Any
    batch_size: int
    tensors: dict[str, Tensor | None]
    dims: dict[str, Dim]
    options: dict[str, Any]

    @property
    def rotated(self) -> list[str]:
        """The names of the rotated tensors."""
        return [name for name in ("x", "q", "k") if name in self.tensors]

    @property
    def weights(self) -> dict[str, str]:
        """The names of the weights that are given, by the tensor that each multiplies."""
        names = {"x": "weight", "q": "q_weight", "k": "k_weight"}
        return {x: names[x] for x in self.rotated if self.tensors.get(names[x]) is not None}

    def has_batch(self, x: str) -> bool:
        """Whether a rotated tensor or its weight has the batch."""
        return self.is_mapped(x, *(weight for y, weight in self.weights.items() if x == y))

    def given(self, name: str) -> Tensor:
        """Returns a tensor that must be there."""
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape that the mapped function sees."""
        shape, dim = self.given(name).shape, self.dims[name]
        return tuple(shape) if dim is None else (*shape[:dim], *shape[dim + 1 :])

    def rank(self, name: str) -> int:
        """Returns the number of dimensions that the mapped function sees."""
        return len(self.shape(name))

    def is_mapped(self, *names: str) -> bool:
        """Whether any of these tensors has the batch."""
        return any(self.dims[name] is not None for name in names)

    def first_of(self, name: str) -> Tensor:
        """Returns what the mapped function sees of a tensor, as a tensor without values."""
        return torch.empty(self.shape(name), dtype=self.given(name).dtype, device="meta")

    def put(self, name: str, tensor: Tensor, dim: Dim = 0) -> None:
        """Replaces a tensor."""
        self.tensors[name] = tensor
        self.dims[name] = dim

    def put_batch_first(self, name: str, size: int) -> Tensor:
        """Moves the batch to the first dimension, or adds one of this size; returns the tensor."""
        self.put(name, _batch_first(self.given(name), self.dims[name], size))
        return self.given(name)

    def on(self, x: str) -> "_Call":
        """Returns the part of a pair's call for ``q``, or for ``k``."""
        name = self.operator._schema.name.removeprefix("rope::").removesuffix("_qk")
        renamed = {x: "x", f"{x}_weight": "weight"}
        others = {"q", "k", "q_weight", "k_weight"}
        names = {y: renamed.get(y, y) for y in self.tensors if y in renamed or y not in others}
        return _Call(
            getattr(torch.ops.rope, name).default,
            self.batch_size,
            {new: self.tensors[old] for old, new in names.items()},
            {new: self.dims[old] for old, new in names.items()},
            self.options,
        )

    def error(self, argument: str, rule: str, got: object) -> str:
        """Returns the text of an error."""
        return message(self.operator._schema.name, argument, rule, got)

    def check_tokens(self, name: str, rank: int) -> None:
        """Checks that each rotated tensor has an embedding axis and at least ``rank`` others.

        Positions or tables with more dimensions could broadcast with the batch. Sizes are checked
        by the operator.
        """
        axis = self.options.get("embedding_axis", -1)
        for rotated in self.rotated:
            shape = self.shape(rotated)
            if not shape:
                raise ValueError(self.error(rotated, "have at least one dimension", "none"))
            if not -len(shape) <= axis < len(shape):
                rule = f"be a dimension of {rotated} of shape {shape}"
                raise IndexError(self.error("embedding_axis", rule, axis))
            if rank >= len(shape):
                rule = f"broadcast with the shape of {rotated} without embedding_axis, of {shape}"
                raise ValueError(self.error(name, rule, self.shape(name)))
        self.check_weights()

    def check_weights(self) -> None:
        """Checks that no weight could broadcast with the batch."""
        for x, weight in self.weights.items():
            if self.rank(weight) == 0:
                rule = f"have a last dimension, the size of {x} along embedding_axis"
                raise ValueError(self.error(weight, rule, self.shape(weight)))
            if self.rank(weight) > self.rank(x):
                rule = f"be broadcastable with the shape of {x}, {self.shape(x)}"
                raise ValueError(self.error(weight, rule, self.shape(weight)))

    def axis(self, x: str) -> int:
        """Returns the embedding axis of a rotated tensor from the end, the same with a batch."""
        axis: int = self.options.get("embedding_axis", -1)
        return axis if axis < 0 else axis - self.rank(x)

    def norm_axes(self, x: str) -> list[int] | None:
        """Returns the axes of a rotated tensor's norm once its embedding axis is the last."""
        axes, axis, rank = self.options.get("norm_axes"), self.axis(x), self.rank(x)
        if axes is None:
            return None
        if not all(-rank <= dim < rank for dim in axes):
            rule = f"be in [{-rank}, {rank - 1}] for the dimensions of {x}"
            raise IndexError(self.error("norm_axes", rule, list(axes)))
        from_end = [dim if dim < 0 else dim - rank for dim in axes]
        return sorted(-1 if dim == axis else dim - (dim > axis) for dim in from_end)


def _map_apply(call: _Call) -> tuple[Any, Any]:
    """Maps a call with positions."""
    inv_freq = call.tensors["inv_freq"]
    axes = 0 if inv_freq is None else call.rank("inv_freq") - 1  # one, or no dimension of axes
    if call.rank("positions") < axes:
        rule = "have a first dimension for the axes of inv_freq"
        raise ValueError(call.error("positions", rule, call.shape("positions")))
    call.check_tokens("positions", call.rank("positions") - axes)
    if call.is_mapped("inv_freq"):
        return _map_frequencies(call)
    mapped = call.is_mapped("positions")
    if mapped:
        positions = call.put_batch_first("positions", call.batch_size)
        positions = _move(positions, 0, axes)  # the axes come before the batch
        rank = 1 + max(map(call.rank, call.rotated))
        call.put("positions", _widen(positions, axes + rank - 1, axes + 1), axes)
    return _rotate(call, mapped)


def _map_frequencies(call: _Call) -> tuple[Any, Any]:
    """Maps a call with different frequencies for each element of the batch, by tables."""
    # The operator checks what the tables do not show, such as a max_wavelength beside inv_freq.
    name = call.operator._schema.name.removeprefix("rope::")
    x, positions, inv_freq = map(call.first_of, (call.rotated[0], "positions", "inv_freq"))
    tensors = (x, None, positions, inv_freq) if "norm" in name else (x, positions, inv_freq)
    composed = getattr(torch.ops.rope, f"{name.removesuffix('_qk')}_composed")
    composed.default(*tensors, **call.options)
    operator = getattr(torch.ops.rope, name.replace("apply", "apply_cos_sin")).default
    shared = {argument.name for argument in operator._schema.arguments}
    of_angles = {key: value for key, value in call.options.items() if key not in shared}

    positions = call.put_batch_first("positions", 1)
    inv_freq = call.put_batch_first("inv_freq", call.batch_size)
    cos, sin = _tables(positions, inv_freq, **of_angles)
    call.put("cos", cos)
    call.put("sin", sin)
    names = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
    names.remove("positions")
    return _map_apply_cos_sin(
        _Call(
            operator,
            call.batch_size,
            {**{key: call.tensors[key] for key in names}, "positions": None},
            {**{key: call.dims[key] for key in names}, "positions": None},
            {key: value for key, value in call.options.items() if key in shared},
        )
    )


def _tables(
    positions: Tensor,
    inv_freq: Tensor,
    *,
    attention_factor: float = 1.0,
    max_wavelength: float = 10000.0,
    scale_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Forms the cosines and sines of a batch of frequencies.

    Args:
        positions: Of shape ``(batch or 1, tokens...)``, or ``(batch or 1, A, tokens...)``.
        inv_freq: Of shape ``(batch, N)``, or ``(batch, A, N)``.
        attention_factor: Multiplies the tables.
        max_wavelength: Its default, which the operator requires beside inv_freq.
        scale_factor: Likewise.

    Returns:
        Two float64 tables of shape ``(batch, tokens..., N)``.
    """
    positions = positions.to(inv_freq.dtype)
    has_axes = inv_freq.dim() == 3
    terms = [
        position.unsqueeze(-1) * _widen(frequency, position.dim() + 1)
        for position, frequency in zip(
            positions.unbind(1) if has_axes else (positions,),
            inv_freq.unbind(1) if has_axes else (inv_freq,),
            strict=True,
        )
    ]
    angle = reduce(torch.add, terms).double()  # from left to right, as the kernels add
    return attention_factor * angle.cos(), attention_factor * angle.sin()


def _map_apply_cos_sin(call: _Call) -> tuple[Any, Any]:
    """Maps a call with tables."""
    if call.rank("cos") != call.rank("sin"):
        raise ValueError(call.error("sin", f"be of shape {call.shape('cos')}", call.shape("sin")))
    by_rows = call.tensors["positions"] is not None
    if by_rows and call.rank("cos") != 2:
        rule = "have the shape (rows, N) where positions are given"
        raise ValueError(call.error("cos", rule, call.shape("cos")))
    if not by_rows and call.rank("cos") == 0:
        raise ValueError(call.error("cos", "have at least one dimension", call.shape("cos")))
    if by_rows:
        call.check_tokens("positions", call.rank("positions"))
    else:
        call.check_tokens("cos", call.rank("cos") - 1)

    rank = 1 + max(map(call.rank, call.rotated))
    mapped = call.is_mapped("cos", "sin", "positions")
    if call.is_mapped("cos", "sin"):
        cos, sin = (call.put_batch_first(name, call.batch_size) for name in ("cos", "sin"))
        if by_rows:
            # One table of the rows of all. A row out of range must not become another table's.
            call.put("positions", call.given("positions").long(), call.dims["positions"])
            rows = call.put_batch_first("positions", 1)
            first = cos.shape[1] * torch.arange(call.batch_size, device=rows.device)
            exists = (rows >= 0) & (rows < cos.shape[1])
            first = first.reshape(-1, *[1] * (rows.dim() - 1))
            call.put("positions", torch.where(exists, rows + first, -1))
            cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        else:
            cos, sin = _widen(cos, rank), _widen(sin, rank)
        call.put("cos", cos)
        call.put("sin", sin)
    if call.is_mapped("positions"):
        positions = call.put_batch_first("positions", call.batch_size)
        call.put("positions", _widen(positions, rank - 1))
    return _rotate(call, mapped)


def _rotate(call: _Call, mapped: bool) -> tuple[Any, Any]:
    """Rotates everything at once.

    Args:
        call: The call. What makes its angles broadcasts with the batch in front.
        mapped: Whether the angles are mapped.

    Returns:
        What the operator returns, and where it has the batch.
    """
    ranks = [call.rank(name) for name in call.rotated]
    axes = [call.axis(name) for name in call.rotated]
    options = {**call.options, "embedding_axis": -1}
    if options.get("norm_axes") is not None:
        options["norm_axes"] = call.norm_axes(call.rotated[0])
    batched = [mapped or call.has_batch(name) for name in call.rotated]
    for name, axis, is_batched in zip(call.rotated, axes, batched, strict=True):
        rank = 1 + (max(ranks) if mapped else call.rank(name))
        if is_batched:
            call.put_batch_first(name, call.batch_size)
        x = _move(call.given(name), axis, -1)
        call.put(name, _widen(x, rank) if is_batched else x, 0 if is_batched else None)
        weight = call.weights.get(name, "")
        if weight and call.is_mapped(weight):
            call.put(weight, _widen(call.put_batch_first(weight, call.batch_size), rank))

    outputs = call.operator(*call.tensors.values(), **options)
    rotated = []
    for y, axis, rank in zip(outputs if len(ranks) == 2 else (outputs,), axes, ranks, strict=True):
        for _ in range(max(ranks) - rank if mapped else 0):
            y = y.squeeze(1)
        rotated.append(_move(y, -1, axis))
    out_dims = tuple(0 if is_batched else None for is_batched in batched)
    return (tuple(rotated), out_dims) if len(ranks) == 2 else (rotated[0], out_dims[0])


def _move(tensor: Tensor, source: int, destination: int) -> Tensor:
    """Moves a dimension; returns the tensor itself if that changes nothing."""
    stays = source % tensor.dim() == destination % tensor.dim()
    return tensor if stays else tensor.movedim(source, destination)


def _batch_first(tensor: Tensor, dim: Dim, size: int) -> Tensor:
    """Returns a view with the batch as its first dimension, expanded if there was none."""
    return tensor.expand(size, *tensor.shape) if dim is None else _move(tensor, dim, 0)


def _widen(tensor: Tensor, rank: int, at: int = 1) -> Tensor:
    """Inserts dimensions of size 1 until there are ``rank`` of them."""
    for _ in range(rank - tensor.dim()):
        tensor = tensor.unsqueeze(at)
    return tensor


def _register(name: str, map_call: Callable[[_Call], tuple[Any, Any]], moved: set[str]) -> None:
    """Registers a rule that moves the tensors named in ``moved`` and those that are rotated."""
    operator = getattr(torch.ops.rope, name).default
    arguments = [a for a in operator._schema.arguments if not a.kwarg_only]

    def rule(
        info: _Info, in_dims: tuple[Dim, ...], *values: Any, **options: Any
    ) -> tuple[Any, Any]:
        missing = [argument.default_value for argument in arguments[len(values) :]]
        names = [argument.name for argument in arguments]
        tensors = dict(zip(names, (*values, *missing), strict=True))
        dims = dict(zip(names, (*in_dims, *(None for _ in missing)), strict=True))
        call = _Call(operator, info.batch_size, tensors, dims, options)
        for argument in set(names) - moved - set(call.rotated):
            if dims[argument] is not None:
                raise NotImplementedError(call.error(argument, "not be mapped by vmap", "a batch"))
        if len({str(call.norm_axes(x)) for x in call.rotated}) == 2:
            # Ranks differ, and the axes do not count from the end.
            results, out_dims = zip(*(map_call(call.on(x)) for x in call.rotated), strict=True)
            return results, out_dims
        return map_call(call)

    register_vmap(f"rope::{name}", rule)


_WEIGHTS = {"weight", "q_weight", "k_weight"}
for _suffix in ("", "_qk"):
    for _prefix in ("", "norm_"):
        _register(f"{_prefix}apply{_suffix}", _map_apply, _WEIGHTS | {"positions", "inv_freq"})
        _register(
            f"{_prefix}apply_cos_sin{_suffix}",
            _map_apply_cos_sin,
            _WEIGHTS | {"cos", "sin", "positions"},
        )
