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
    def span(self) -> int:
        """The length that a buffer must have, with room for three elements behind the tensor."""
        reach = sum(
            (size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)
        )
        return self.offset + (reach if prod(self.size) else 0) + 4

    def of(self, buffer: Tensor) -> Tensor:
        """Returns the view of a flat buffer that has this layout."""
        return buffer.as_strided(self.size, self.stride, self.offset)

    def values(self, dtype: torch.dtype, device: str, *, seed: int = 0) -> Tensor:
        """Returns a tensor of random numbers in this layout."""
        return self.of(random_values((self.span,), dtype, device, seed=seed))

    def addresses(self) -> list[int]:
        """Returns the place of every element in the buffer."""
        return self.of(torch.arange(self.span)).flatten().tolist()


def stored(x: Tensor, order: tuple[int, ...], step: int) -> Tensor:
    """Returns a copy of x whose dimensions are in this order in memory, with steps in the last."""
    sizes = [x.shape[d] for d in order]
    buffer = torch.zeros(*sizes[:-1], step * sizes[-1], dtype=x.dtype, device=x.device)
    copy = buffer[..., ::step].permute([order.index(d) for d in range(x.dim())])
    return copy.copy_(x)


@st.composite
def layouts(draw: st.DrawFn, size: Sequence[int], *, expanded: bool = False) -> Layout:
    """Draws a layout with permuted dimensions and gaps; ``expanded`` adds strides of 0."""
    stride = [0] * len(size)
    extent = 1
    for dim in draw(st.permutations(range(len(size)))):
        if expanded and draw(st.integers(0, 3)) == 0:
            continue
        stride[dim] = extent * draw(st.sampled_from((1, 1, 2, 3)))
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
def rotated(draw: st.DrawFn, *, expanded: bool = True) -> Rotated:
    """Draws a tensor to be rotated."""
    tokens = draw(st.lists(st.sampled_from((1, 2, 3, 5, 2, 3, 5, 0)), max_size=4))
    axis = draw(st.integers(0, len(tokens)))
    pairs = draw(st.integers(0, 20))
    offset, rest = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)) | st.just((0, 0)))
    size = [*tokens[:axis], offset + 2 * pairs + rest, *tokens[axis:]]
    return Rotated(
        draw(layouts(size, expanded=expanded)),
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
def applications(draw: st.DrawFn, *, expanded: bool = True) -> Application:
    """Draws a call of ``apply``."""
    x = draw(rotated(expanded=expanded))
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
def table_applications(draw: st.DrawFn, *, expanded: bool = True) -> TableApplication:
    """Draws a call of ``apply_cos_sin``."""
    x = draw(rotated(expanded=expanded))
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
    draw: st.DrawFn, *, expanded: bool = True, tables: bool = False
) -> Normalization:
    """Draws a call of ``norm_apply``, or of ``norm_apply_cos_sin``."""
    rotations = table_applications if tables else applications
    rotation: Application | TableApplication = draw(rotations(expanded=expanded))
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
