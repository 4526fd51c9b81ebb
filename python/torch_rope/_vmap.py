"""torch.vmap calls the kernel once for the whole batch.

Rotated tensors get the batch as their first dimension and the embedding as their last, as views.
Positions and tables that are not mapped broadcast from the right unchanged. Mapped ones get the
batch first too, followed by dimensions of size 1 if a rotated tensor has more dimensions than they.
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


def _map_apply(call: _Call) -> tuple[Any, Any]:
    """Maps ``apply`` or ``apply_qk``."""
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
    torch.ops.rope.apply_composed.default(
        *(call.first_of(name) for name in (call.rotated[0], "positions", "inv_freq")),
        **call.options,
    )
    name = call.operator._schema.name.removeprefix("rope::").replace("apply", "apply_cos_sin")
    operator = getattr(torch.ops.rope, name).default
    shared = {argument.name for argument in operator._schema.arguments}
    of_angles = {key: value for key, value in call.options.items() if key not in shared}

    positions = call.put_batch_first("positions", 1)
    inv_freq = call.put_batch_first("inv_freq", call.batch_size)
    cos, sin = _tables(positions, inv_freq, **of_angles)
    call.put("cos", cos)
    call.put("sin", sin)
    names = [*call.rotated, "cos", "sin"]
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
    """Maps ``apply_cos_sin`` or ``apply_cos_sin_qk``."""
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
    axis = call.options.get("embedding_axis", -1)
    axes = [axis if axis < 0 else axis - rank for rank in ranks]  # the same behind a batch
    out_dims = [0 if mapped or call.is_mapped(name) else None for name in call.rotated]
    for name, axis in zip(call.rotated, axes, strict=True):
        if mapped or call.is_mapped(name):
            call.put_batch_first(name, call.batch_size)
        x = _move(call.given(name), axis, -1)
        call.put(name, _widen(x, 1 + max(ranks)) if mapped else x)

    options = {**call.options, "embedding_axis": -1}
    outputs = call.operator(*call.tensors.values(), **options)
    results = []
    for y, axis, rank in zip(outputs if len(ranks) == 2 else (outputs,), axes, ranks, strict=True):
        for _ in range(max(ranks) - rank if mapped else 0):
            y = y.squeeze(1)
        results.append(_move(y, -1, axis))
    return (tuple(results), tuple(out_dims)) if len(ranks) == 2 else (results[0], out_dims[0])


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
        return map_call(call)

    register_vmap(f"rope::{name}", rule)


for _suffix in ("", "_qk"):
    _register(f"apply{_suffix}", _map_apply, {"positions", "inv_freq"})
    _register(f"apply_cos_sin{_suffix}", _map_apply_cos_sin, {"cos", "sin", "positions"})
