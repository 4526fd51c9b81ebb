"""torch.vmap calls the kernel once for the whole batch.

What is rotated gets the batch as its first dimension and the embedding as its last: views alone.
Positions and tables that are not mapped broadcast from the right as they are. Those that are mapped
get the batch first too, and ones behind it where what is rotated has more dimensions than they. The
forms in place need no rule: under a transform they are the functional form and a copy.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import register_vmap

# Where a tensor has the batch, if it has.
Dim = int | None

# What apply_cos_sin has of the options of apply.
_TABLE_OPTIONS = {"embedding_axis", "rotary_offset", "interleaved", "conjugate"}


class _Info(Protocol):
    """What PyTorch tells a rule about the map."""

    batch_size: int


def _map_apply(
    num_rotated: int, info: _Info, in_dims: tuple[Dim, ...], *arguments: Any, **options: Any
) -> tuple[Any, Any]:
    """Maps ``apply`` (``num_rotated`` of 1) or ``apply_qk`` (of 2)."""
    rotated, dims = arguments[:num_rotated], in_dims[:num_rotated]
    positions, inv_freq = (*arguments[num_rotated:], None)[:2]
    positions_dim, inv_freq_dim = (*in_dims[num_rotated:], None)[:2]
    inv_freq_rank = 1 if inv_freq is None else _rank(inv_freq, inv_freq_dim)
    axes = inv_freq_rank - 1  # whether positions begin with a dimension of axes
    tokens = _rank(positions, positions_dim) - axes if axes in (0, 1) else -1
    if not _fits(tokens, rotated, dims, options):
        _refuse("apply", num_rotated, arguments, in_dims, options)

    if inv_freq_dim is not None:
        # A table for each element of the batch. The composed form checks what it is made of.
        for x, dim in zip(rotated, dims, strict=True):
            examples = map(_example, (x, positions, inv_freq), (dim, positions_dim, inv_freq_dim))
            torch.ops.rope.apply_composed(*examples, **options)
        positions = _batch_first(positions, positions_dim, 1)
        tables = _tables(positions, _move(inv_freq, inv_freq_dim, 0), **options)
        kept = {name: options[name] for name in _TABLE_OPTIONS & options.keys()}
        return _map_apply_cos_sin(num_rotated, info, (*dims, 0, 0), *rotated, *tables, **kept)

    mapped = positions_dim is not None
    if mapped:
        positions = _batch_first(positions, positions_dim, info.batch_size)
        positions = _move(positions, 0, axes)  # the axes come before the batch
        rank = 1 + max(map(_rank, rotated, dims))
        positions = _widen(positions, axes + rank - 1, axes + 1)
    return _rotate("apply", info, rotated, dims, (positions, inv_freq), options, mapped=mapped)


def _map_apply_cos_sin(
    num_rotated: int, info: _Info, in_dims: tuple[Dim, ...], *arguments: Any, **options: Any
) -> tuple[Any, Any]:
    """Maps ``apply_cos_sin`` (``num_rotated`` of 1) or ``apply_cos_sin_qk`` (of 2)."""
    rotated, dims = arguments[:num_rotated], in_dims[:num_rotated]
    cos, sin, positions = (*arguments[num_rotated:], None)[:3]
    cos_dim, sin_dim, positions_dim = (*in_dims[num_rotated:], None)[:3]
    table_ranks = _rank(cos, cos_dim), _rank(sin, sin_dim)
    if positions is None:
        tokens = table_ranks[0] - 1 if table_ranks[0] == table_ranks[1] else -1
    else:
        tokens = _rank(positions, positions_dim) if table_ranks == (2, 2) else -1
    if not _fits(tokens, rotated, dims, options):
        _refuse("apply_cos_sin", num_rotated, arguments, in_dims, options)

    rank = 1 + max(map(_rank, rotated, dims))
    mapped = (cos_dim, sin_dim, positions_dim) != (None, None, None)
    if (cos_dim, sin_dim) != (None, None):
        cos = _batch_first(cos, cos_dim, info.batch_size)
        sin = _batch_first(sin, sin_dim, info.batch_size)
        if positions is None:
            cos, sin = _widen(cos, rank), _widen(sin, rank)
        else:
            # One table of the rows of all. A row that does not exist must not become another's.
            rows = _batch_first(positions.long(), positions_dim, 1)
            first = cos.shape[1] * torch.arange(info.batch_size, device=rows.device)
            exists = (rows >= 0) & (rows < cos.shape[1])
            positions = torch.where(exists, rows + first.reshape(-1, *[1] * (rows.dim() - 1)), -1)
            positions_dim = 0
            cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
    if positions_dim is not None:
        positions = _widen(_batch_first(positions, positions_dim, info.batch_size), rank - 1)
    angles = (cos, sin, positions)
    return _rotate("apply_cos_sin", info, rotated, dims, angles, options, mapped=mapped)


def _rotate(
    name: str,
    info: _Info,
    rotated: Sequence[Tensor],
    dims: Sequence[Dim],
    angles: Sequence[Tensor | None],
    options: dict[str, Any],
    *,
    mapped: bool,
) -> tuple[Any, Any]:
    """Rotates everything at once.

    Args:
        name: The operator for one tensor.
        info: What is known of the map.
        rotated: x, or q and k.
        dims: Where they have the batch.
        angles: The arguments behind them. Those that are mapped broadcast with the batch in front.
        options: The options of the operator.
        mapped: Whether any of ``angles`` is.

    Returns:
        What the operator returns, and where it has the batch.
    """
    ranks = list(map(_rank, rotated, dims))
    axis = options.get("embedding_axis", -1)
    axes = [axis if axis < 0 else axis - rank for rank in ranks]  # also right behind a batch
    inputs = []
    for x, dim, axis in zip(rotated, dims, axes, strict=True):
        if mapped or dim is not None:
            x = _batch_first(x, dim, info.batch_size)
        x = _move(x, axis, -1)
        inputs.append(_widen(x, 1 + max(ranks)) if mapped else x)

    options = {**options, "embedding_axis": -1}
    rotate = _operator(name, len(rotated))
    outputs = rotate(*inputs, *angles, **options)
    results = []
    for y, axis, rank in zip(
        outputs if len(rotated) == 2 else (outputs,), axes, ranks, strict=True
    ):
        for _ in range(max(ranks) - rank if mapped else 0):
            y = y.squeeze(1)
        results.append(_move(y, -1, axis))
    out_dims = [None if dim is None and not mapped else 0 for dim in dims]
    return (tuple(results), tuple(out_dims)) if len(rotated) == 2 else (results[0], out_dims[0])


def _tables(
    positions: Tensor, inv_freq: Tensor, attention_factor: float = 1.0, **_: Any
) -> tuple[Tensor, Tensor]:
    """Forms the cosines and sines of a batch of frequencies.

    Args:
        positions: Of shape ``(batch or 1, tokens...)``, or ``(batch or 1, A, tokens...)``.
        inv_freq: Of shape ``(batch, N)``, or ``(batch, A, N)``.
        attention_factor: What multiplies the tables.

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


def _fits(
    tokens: int, rotated: Sequence[Tensor], dims: Sequence[Dim], options: dict[str, Any]
) -> bool:
    """Whether ``tokens`` dimensions broadcast with each of what is rotated, and the axis exists.

    What does not fit the tensors that the mapped function sees might well fit those with a batch.
    """
    axis = options.get("embedding_axis", -1)
    ranks = map(_rank, rotated, dims)
    return tokens >= 0 and all(tokens < rank and -rank <= axis < rank for rank in ranks)


def _refuse(
    name: str,
    num_rotated: int,
    arguments: Sequence[Any],
    in_dims: Sequence[Dim],
    options: dict[str, Any],
) -> None:
    """Lets the operator say what does not fit, of what the mapped function sees."""
    _operator(name, num_rotated)(*map(_example, arguments, in_dims), **options)
    raise AssertionError(f"rope::{name} took what does not fit")


def _operator(name: str, num_rotated: int) -> Any:
    """Returns the operator for one tensor or for a pair."""
    return getattr(torch.ops.rope, name if num_rotated == 1 else f"{name}_qk").default


def _rank(tensor: Tensor, dim: Dim) -> int:
    """Returns the number of dimensions that the mapped function sees."""
    return tensor.dim() - (dim is not None)


def _example(argument: Any, dim: Dim) -> Any:
    """Returns what the mapped function sees of an argument, without its values."""
    if not isinstance(argument, Tensor):
        return argument
    shape = list(argument.shape)
    if dim is not None:
        del shape[dim]
    return torch.empty(shape, dtype=argument.dtype, device="meta")


def _move(tensor: Tensor, source: int, destination: int) -> Tensor:
    """Moves a dimension; returns the tensor itself where that changes nothing."""
    stays = source % tensor.dim() == destination % tensor.dim()
    return tensor if stays else tensor.movedim(source, destination)


def _batch_first(tensor: Tensor, dim: Dim, size: int) -> Tensor:
    """Returns a view with the batch as its first dimension, expanded where there was none."""
    return tensor.expand(size, *tensor.shape) if dim is None else _move(tensor, dim, 0)


def _widen(tensor: Tensor, rank: int, at: int = 1) -> Tensor:
    """Inserts ones until there are ``rank`` dimensions."""
    for _ in range(rank - tensor.dim()):
        tensor = tensor.unsqueeze(at)
    return tensor


for _num_rotated, _suffix in ((1, ""), (2, "_qk")):
    register_vmap(f"rope::apply{_suffix}", partial(_map_apply, _num_rotated))
    register_vmap(f"rope::apply_cos_sin{_suffix}", partial(_map_apply_cos_sin, _num_rotated))
