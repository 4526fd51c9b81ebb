"""Randomly drawn calls: shapes, memory layouts, positions, frequencies and options."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from reference import random_inv_freq, random_positions, random_values
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
POSITION_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
INV_FREQ_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in a flat buffer: what ``Tensor.as_strided`` takes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def extent(self) -> int:
        """The length that a buffer must have, to the last element of the tensor and no further."""
        if not prod(self.size):
            return 0
        reach = sum(
            (size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)
        )
        return self.offset + reach + 1

    @property
    def span(self) -> int:
        """The length of a buffer with room for three elements behind the tensor."""
        return max(self.extent, self.offset + 1) + 3

    def of(self, buffer: Tensor) -> Tensor:
        """Returns the view of a flat buffer that has this layout."""
        return buffer.as_strided(self.size, self.stride, self.offset)

    def values(self, dtype: torch.dtype, device: str, *, seed: int = 0) -> Tensor:
        """Returns a tensor of random numbers in this layout."""
        return self.of(random_values((self.span,), dtype, device, seed=seed))

    def addresses(self) -> list[int]:
        """Returns the place of every element in the buffer."""
        return self.places().tolist()

    def places(self) -> Tensor:
        """Returns the same as a tensor."""
        return self.of(torch.arange(self.span)).flatten()


def stored(x: Tensor, order: tuple[int, ...], step: int) -> Tensor:
    """Returns a copy of x whose dimensions are in this order in memory, with steps in the last."""
    sizes = [x.shape[d] for d in order]
    buffer = torch.zeros(*sizes[:-1], step * sizes[-1], dtype=x.dtype, device=x.device)
    copy = buffer[..., ::step].permute([order.index(d) for d in range(x.dim())])
    return copy.copy_(x)


@st.composite
def layouts(
    draw: st.DrawFn, size: Sequence[int], *, expanded: bool = False, contiguous: int | None = None
) -> Layout:
    """Draws a layout with permuted dimensions and gaps.

    Args:
        draw: Draws.
        size: Of the tensor.
        expanded: Adds strides of 0.
        contiguous: A dimension whose elements follow each other.
    """
    stride = [0] * len(size)
    extent = 1
    order = draw(st.permutations(range(len(size))))
    for dim in sorted(order, key=lambda dim: dim != contiguous):
        if dim != contiguous and expanded and draw(st.integers(0, 3)) == 0:
            continue
        steps = (1,) if dim == contiguous else (1, 1, 2, 3)
        stride[dim] = extent * draw(st.sampled_from(steps))
        extent = stride[dim] * max(size[dim], 1) + draw(st.sampled_from((0, 0, 1)))
    return Layout(tuple(size), tuple(stride), draw(st.integers(0, 3)))


@st.composite
def broadcastable(draw: st.DrawFn, size: Sequence[int]) -> list[int]:
    """Draws a shape that broadcasts to ``size``: fewer dimensions, and 1 in place of some."""
    kept = size[draw(st.integers(0, len(size))) :]
    return [1 if draw(st.booleans()) else extent for extent in kept]


@dataclass(frozen=True)
class Rotated:
    """A drawn tensor to be rotated, and where in it the rotated slice lies."""

    layout: Layout
    dtype: torch.dtype
    embedding_axis: int
    rotary_offset: int
    pairs: int

    @property
    def tokens(self) -> list[int]:
        """The shape without the embedding axis: what positions broadcast to."""
        size = list(self.layout.size)
        del size[self.embedding_axis]
        return size

    @property
    def ends_with_axis(self) -> bool:
        """Whether the slice reaches the end of the axis, as it does by default."""
        end = self.rotary_offset + 2 * self.pairs
        return end == self.layout.size[self.embedding_axis]


@st.composite
def many_tokens(draw: st.DrawFn) -> list[int]:
    """Draws up to five sizes, of a few hundred tokens; some are vectors and a tail."""
    sizes = draw(st.lists(st.sampled_from((1, 2, 3, 5, 7, 11, 0)), max_size=5))
    if sizes and draw(st.booleans()):
        long = draw(st.sampled_from((16, 17, 31, 33, 64, 67, 129)))
        sizes[draw(st.integers(0, len(sizes) - 1))] = long
    total = 1
    for dim, size in enumerate(sizes):
        sizes[dim] = size if total * size <= 400 else 1
        total *= max(sizes[dim], 1)
    return sizes


# Among them whole vectors of each dtype, and a pair more or less.
MANY_PAIRS = (23, 24, 31, 32, 33, 40, 63, 64, 65, 96, 128)


@st.composite
def rotated(draw: st.DrawFn, *, expanded: bool = True, wide: bool = False) -> Rotated:
    """Draws a tensor to be rotated; ``wide`` adds ranks and sizes."""
    few = st.lists(st.sampled_from((1, 2, 3, 5, 2, 3, 5, 0)), max_size=4)
    tokens = draw(many_tokens() if wide else few)
    axis = draw(st.integers(0, len(tokens)))
    pairs = draw(st.integers(0, 20) | st.sampled_from(MANY_PAIRS) if wide else st.integers(0, 20))
    around = st.integers(0, 5) | st.sampled_from((16, 33, 70)) if wide else st.integers(0, 5)
    offset, rest = draw(st.tuples(around, around) | st.just((0, 0)))
    size = [*tokens[:axis], offset + 2 * pairs + rest, *tokens[axis:]]
    contiguous = axis if wide and draw(st.integers(0, 2)) else None
    return Rotated(
        draw(layouts(size, expanded=expanded, contiguous=contiguous)),
        draw(st.sampled_from(FLOAT_DTYPES)),
        draw(st.sampled_from((axis, axis - len(size)))),
        offset,
        pairs,
    )


@dataclass(frozen=True)
class Application:
    """A drawn call of ``apply``."""

    x: Rotated
    positions: Layout
    positions_dtype: torch.dtype
    inv_freq: Layout | None
    inv_freq_dtype: torch.dtype
    options: dict[str, Any]

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns x, positions and inv_freq."""
        x = self.x.layout.values(self.x.dtype, device)
        positions = self.positions.of(
            random_positions((self.positions.span,), self.positions_dtype, device)
        )
        if self.inv_freq is None:
            return x, positions, None
        frequencies = random_inv_freq((self.inv_freq.span,), self.inv_freq_dtype, device)
        return x, positions, self.inv_freq.of(frequencies)


@st.composite
def applications(draw: st.DrawFn, *, expanded: bool = True, wide: bool = False) -> Application:
    """Draws a call of ``apply``."""
    x = draw(rotated(expanded=expanded, wide=wide))
    positions = draw(broadcastable(x.tokens))
    options = {
        "embedding_axis": x.embedding_axis,
        "rotary_offset": x.rotary_offset,
        "attention_factor": draw(st.sampled_from((1.0, 0.8, 1.25))),
        "interleaved": draw(st.booleans()),
        "conjugate": draw(st.booleans()),
    }
    inv_freq = draw(st.sampled_from(("none", "one axis", "axes")))
    frequencies = [x.pairs]
    if inv_freq == "none":
        options["max_wavelength"] = draw(st.sampled_from((10000.0, 5e5, 100.0)))
        options["scale_factor"] = draw(st.sampled_from((1.0, 8.0, 0.5)))
    elif inv_freq == "axes":
        axes = draw(st.integers(1, 4))
        frequencies = [axes, x.pairs]
        positions = [axes, *positions]
    has_default = inv_freq != "none" or x.ends_with_axis
    if not has_default or draw(st.booleans()):
        options["rotary_dim"] = 2 * x.pairs
    return Application(
        x,
        draw(layouts(positions, expanded=True)),
        draw(st.sampled_from(POSITION_DTYPES)),
        None if inv_freq == "none" else draw(layouts(frequencies, expanded=True)),
        draw(st.sampled_from(INV_FREQ_DTYPES)),
        options,
    )


@dataclass(frozen=True)
class TableApplication:
    """A drawn call of ``apply_cos_sin``."""

    x: Rotated
    cos: Layout
    sin: Layout
    tables_dtype: torch.dtype
    positions: Layout | None
    positions_dtype: torch.dtype
    options: dict[str, Any]

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns x, cos, sin and positions."""
        x = self.x.layout.values(self.x.dtype, device)
        cos = self.cos.values(self.tables_dtype, device, seed=1)
        sin = self.sin.values(self.tables_dtype, device, seed=2)
        if self.positions is None:
            return x, cos, sin, None
        rows = random_positions(
            (self.positions.span,), self.positions_dtype, device, low=0, high=self.cos.size[0]
        )
        return x, cos, sin, self.positions.of(rows)


@st.composite
def table_applications(
    draw: st.DrawFn, *, expanded: bool = True, wide: bool = False
) -> TableApplication:
    """Draws a call of ``apply_cos_sin``."""
    x = draw(rotated(expanded=expanded, wide=wide))
    by_position = draw(st.booleans())
    tokens = draw(broadcastable(x.tokens))
    full_width = draw(st.booleans())
    columns = 2 * x.pairs if full_width else x.pairs
    size = [draw(st.integers(1, 9)), columns] if by_position else [*tokens, columns]
    return TableApplication(
        x,
        draw(layouts(size, expanded=True)),
        draw(layouts(size, expanded=True)),
        draw(st.sampled_from(FLOAT_DTYPES)),
        draw(layouts(tokens, expanded=True)) if by_position else None,
        draw(st.sampled_from(INDEX_DTYPES)),
        {
            "embedding_axis": x.embedding_axis,
            "rotary_dim": draw(st.sampled_from((None, 2 * x.pairs))),
            "rotary_offset": x.rotary_offset,
            "interleaved": draw(st.booleans()),
            "conjugate": draw(st.booleans()),
            "full_width": full_width,
        },
    )


@dataclass(frozen=True)
class Normalization:
    """A drawn call of ``norm_apply`` or ``norm_apply_cos_sin``."""

    rotation: Application | TableApplication
    weight: Layout | None
    weight_dtype: torch.dtype
    options: dict[str, Any]

    @property
    def x(self) -> Rotated:
        """What is normalized and rotated."""
        return self.rotation.x

    def tensors(self, device: str) -> tuple[Tensor | None, ...]:
        """Returns x, weight and what makes the angles."""
        x, *angles = self.rotation.tensors(device)
        weight = None
        if self.weight is not None:
            weight = self.weight.values(self.weight_dtype, device, seed=5)
        return x, weight, *angles


@st.composite
def normalizations(
    draw: st.DrawFn, *, expanded: bool = True, tables: bool = False, wide: bool = False
) -> Normalization:
    """Draws a call of ``norm_apply``, or of ``norm_apply_cos_sin``."""
    rotations = table_applications if tables else applications
    rotation: Application | TableApplication = draw(rotations(expanded=expanded, wide=wide))
    x = rotation.x
    weight = None
    if draw(st.integers(0, 3)):
        size = [*draw(broadcastable(x.tokens)), x.layout.size[x.embedding_axis]]
        weight = draw(layouts(size, expanded=True))
    return Normalization(
        rotation,
        weight,
        draw(st.sampled_from(FLOAT_DTYPES)),
        {
            **rotation.options,
            "eps": draw(st.sampled_from((1e-6, 1e-5, 0.1, 0.0))),
            "weight_offset": draw(st.sampled_from((0.0, 1.0, -0.3))),
            "norm_axes": draw(norm_axes(len(x.layout.size), x.embedding_axis)),
            "norm_last": draw(st.booleans()),
        },
    )


@st.composite
def norm_axes(draw: st.DrawFn, rank: int, embedding_axis: int) -> list[int] | None:
    """Draws the axes of a norm, in any order and counted from either end."""
    if draw(st.booleans()):
        return None
    others = [axis for axis in range(rank) if axis != embedding_axis % rank]
    chosen = draw(st.sets(st.sampled_from(others))) if others else set()
    axes = draw(st.permutations([*chosen, embedding_axis % rank]))
    return [axis - rank if draw(st.booleans()) else axis for axis in axes]


@dataclass(frozen=True)
class Subject:
    """One tensor of a call that is rotated, with its weight."""

    layout: Layout
    dtype: torch.dtype
    weight: Layout | None = None
    weight_dtype: torch.dtype = torch.float32
    negated: bool = False  # The view of a lazily negated tensor.


@dataclass(frozen=True)
class Argument:
    """A tensor that makes the angles: 'positions', 'rows', 'inv_freq', 'cos' or 'sin'."""

    kind: str
    layout: Layout
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """A call of any operator in any form: its repr is an expression that makes it again."""

    operator: str  # of the functions of Python, without a trailing _
    subjects: tuple[Subject, ...]  # one, or q and k
    angles: tuple[Argument | None, ...]
    options: dict[str, Any]
    in_place: bool = False
    through_dispatcher: bool = False  # torch.ops.rope instead of Python's function
    is_shared: bool = False  # q and k are views of one buffer.

    @property
    def normalizes(self) -> bool:
        """Whether the operator has weights."""
        return self.operator.startswith("norm")


def spread(layout: Layout, step: int, offset: int) -> Layout:
    """Returns a layout with every step-th of the elements, from an offset on."""
    stride = tuple(step * one for one in layout.stride)
    return Layout(layout.size, stride, step * layout.offset + offset)


@st.composite
def weights(draw: st.DrawFn, size: Sequence[int], embedding_axis: int) -> Layout | None:
    """Draws the layout of a weight, or None."""
    if not draw(st.integers(0, 3)):
        return None
    tokens = [*size]
    axis_size = tokens.pop(embedding_axis)
    return draw(layouts([*draw(broadcastable(tokens)), axis_size], expanded=True))


@st.composite
def sizes_of_k(draw: st.DrawFn, q: Rotated, tokens: Sequence[int], *, free_axis: bool) -> list[int]:
    """Draws the size of k for q, where the angles have these ``tokens``."""
    sizes = list(q.tokens)
    for dim in range(-len(sizes), 0):
        shared = -dim > len(tokens) or tokens[dim] == 1
        if shared and draw(st.booleans()):
            sizes[dim] = draw(st.sampled_from((0, 1, 2, 3, 6)))
    end = q.rotary_offset + 2 * q.pairs
    axis_size = end + draw(st.integers(0, 5)) if free_axis else q.layout.size[q.embedding_axis]
    axis = q.embedding_axis % len(q.layout.size)
    sizes.insert(axis, axis_size)
    if q.embedding_axis < 0:  # Leading dimensions that only q has, or only k.
        spare = max(len(sizes) - max(len(tokens) + 1, -q.embedding_axis), 0)
        sizes = sizes[draw(st.integers(0, min(spare, axis))) :]
        if len(sizes) < 6 and draw(st.integers(0, 5)) == 0:
            sizes = [2, *sizes]
    return sizes


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Draws a call of any operator in any form."""
    in_place = draw(st.booleans())
    tables = draw(st.booleans())
    normalizes = draw(st.booleans())
    rotations = table_applications if tables else applications
    rotation: Application | TableApplication = draw(rotations(expanded=not in_place, wide=True))
    q = rotation.x
    options = dict(rotation.options)
    angles: tuple[Argument | None, ...]
    if isinstance(rotation, TableApplication):
        rows = rotation.positions
        angles = (
            Argument("cos", rotation.cos, rotation.tables_dtype),
            Argument("sin", rotation.sin, rotation.tables_dtype),
            None if rows is None else Argument("rows", rows, rotation.positions_dtype),
        )
        angle_tokens = rotation.cos.size[:-1] if rows is None else rows.size
        has_slice = True
    else:
        inv_freq = rotation.inv_freq
        angles = (
            Argument("positions", rotation.positions, rotation.positions_dtype),
            None if inv_freq is None else Argument("inv_freq", inv_freq, rotation.inv_freq_dtype),
        )
        has_axes = inv_freq is not None and len(inv_freq.size) == 2
        angle_tokens = rotation.positions.size[1 if has_axes else 0 :]
        has_slice = inv_freq is not None or "rotary_dim" in options
    sizes = [(q.layout.size, q.layout, q.dtype)]
    if draw(st.booleans()):
        size = draw(sizes_of_k(q, angle_tokens, free_axis=has_slice))
        dtype = draw(st.sampled_from((q.dtype, *FLOAT_DTYPES)))
        contiguous = q.embedding_axis % len(size) if draw(st.booleans()) else None
        layout = draw(layouts(size, expanded=not in_place, contiguous=contiguous))
        sizes.append((size, layout, dtype))
    is_shared = len(sizes) == 2 and sizes[0][2] == sizes[1][2] and draw(st.booleans())
    if is_shared and in_place:
        (q_size, q_layout, q_dtype), (k_size, k_layout, k_dtype) = sizes
        if draw(st.booleans()):
            q_layout, k_layout = spread(q_layout, 2, 0), spread(k_layout, 2, 1)
        else:
            k_layout = spread(k_layout, 1, q_layout.span)
        sizes = [(q_size, q_layout, q_dtype), (k_size, k_layout, k_dtype)]
    if normalizes:
        rank = min(len(size) for size, *_ in sizes)
        options["eps"] = draw(st.sampled_from((1e-6, 1e-5, 0.1, 0.0)))
        options["weight_offset"] = draw(st.sampled_from((0.0, 1.0, -0.3)))
        options["norm_last"] = draw(st.booleans())
        axes = draw(norm_axes(rank, q.embedding_axis))
        if axes is not None and len({len(size) for size, *_ in sizes}) == 2:
            axes = [axis if axis < 0 else axis - rank for axis in axes]
        options["norm_axes"] = axes
    subjects = []
    for size, layout, dtype in sizes:
        weight = None
        if normalizes:
            weight = draw(weights(size, q.embedding_axis))
        weight_dtype = draw(st.sampled_from(FLOAT_DTYPES))
        negated = not is_shared and draw(st.integers(0, 7)) == 0
        subjects.append(Subject(layout, dtype, weight, weight_dtype, negated))
    name = f"{'norm_' if normalizes else ''}apply{'_cos_sin' if tables else ''}"
    return Call(name, tuple(subjects), angles, options, in_place, draw(st.booleans()), is_shared)
