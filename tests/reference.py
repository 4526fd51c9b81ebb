"""Norm and rotation in float64, written plainly from their formulas, and the error of an output.

The tests compare the library with it; it shares no code with the library, and runs on the CPU.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# The error of an element before it is rounded to the output's dtype, over the norm of its pair.
FLOAT32_ERROR = 2.0**-21
# Two products and their sum, each rounded at 2**-53, in the library and in the reference.
FLOAT64_ERROR_OF_TABLES = 4 * 2.0**-53
# cos and sin are within 1e-12, which moves a pair of norm 1 by at most sqrt(2) times that.
FLOAT64_ERROR = math.sqrt(2.0) * 1e-12 + FLOAT64_ERROR_OF_TABLES
# An exponent, a power, a quotient and a product with a position, each rounded to float64, in an
# order that the formula leaves open.
ERROR_OF_FORMED_ANGLE = 2.0**-51
# The error of an element that is normalized and rotated, over the norm of its pair before the
# weight times the larger of its two weights: that of the norm and that of the rotation.
NORM_FLOAT32_ERROR = 1e-6 + 2.5e-7
NORM_FLOAT64_ERROR = 1e-14 + 1e-12


class Expected(NamedTuple):
    """What an operator should return.

    Attributes:
        values: The exact result, float64.
        tolerance: How far from it each element may be before it is rounded to the output's dtype;
            0 where the element must come out as it is.
        norms: The norm of each element's pair; 0 outside the rotated slice.
    """

    values: Tensor
    tolerance: Tensor
    norms: Tensor


def angles(
    positions: Tensor,
    rotary_dim: int,
    inv_freq: Tensor | None = None,
    max_wavelength: float = 10000.0,
    scale_factor: float = 1.0,
) -> Tensor:
    """Returns the angle of each pair at each position, float64, of shape ``(..., N)``."""
    if inv_freq is None:
        powers = [max_wavelength ** (-2 * n / rotary_dim) for n in range(rotary_dim // 2)]
        frequencies = torch.tensor(powers, dtype=torch.float64)
        return positions.double()[..., None] * frequencies / scale_factor
    rounded = positions.to(inv_freq.dtype)[..., None]
    if inv_freq.dim() == 1:
        return (rounded * inv_freq).double()
    total = rounded[0] * inv_freq[0]
    for axis in range(1, inv_freq.shape[0]):
        total = total + rounded[axis] * inv_freq[axis]
    return total.double()


def apply(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None = None,
    *,
    embedding_axis: int = -1,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    max_wavelength: float = 10000.0,
    scale_factor: float = 1.0,
    attention_factor: float = 1.0,
    interleaved: bool = False,
    conjugate: bool = False,
) -> Expected:
    """Rotates ``x`` as ``rope::apply`` should."""
    positions = positions.cpu()
    if inv_freq is not None:
        inv_freq = inv_freq.cpu()
        rotary_dim = 2 * inv_freq.shape[-1]
    elif rotary_dim is None:
        rotary_dim = x.shape[embedding_axis] - rotary_offset
    angle = angles(positions, rotary_dim, inv_freq, max_wavelength, scale_factor)
    error = torch.full_like(angle, FLOAT64_ERROR if x.dtype == torch.float64 else FLOAT32_ERROR)
    if inv_freq is None:
        error = error + angle.abs() * ERROR_OF_FORMED_ANGLE
    cos = attention_factor * angle.cos()
    sin = attention_factor * angle.sin()
    tables = _Tables(cos, sin, cos, sin)
    return _rotate(x, tables, error, embedding_axis, rotary_offset, interleaved, conjugate)


def apply_cos_sin(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    embedding_axis: int = -1,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    conjugate: bool = False,
    full_width: bool = False,
) -> Expected:
    """Rotates ``x`` as ``rope::apply_cos_sin`` should."""
    cos, sin = cos.cpu().double(), sin.cpu().double()
    if positions is not None:
        rows = positions.cpu().long()
        cos, sin = cos[rows], sin[rows]
    tables = _Tables(cos, sin, cos, sin)
    if full_width:
        pairs = cos.shape[-1] // 2
        first = torch.arange(pairs) * (2 if interleaved else 1)
        second = first + (1 if interleaved else pairs)
        tables = _Tables(cos[..., first], sin[..., first], cos[..., second], sin[..., second])
    assert rotary_dim in (None, 2 * tables.cos_a.shape[-1])
    error = torch.full_like(
        tables.cos_a, FLOAT64_ERROR_OF_TABLES if x.dtype == torch.float64 else FLOAT32_ERROR
    )
    return _rotate(x, tables, error, embedding_axis, rotary_offset, interleaved, conjugate)


def norm_apply(
    x: Tensor,
    weight: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor | None = None,
    **options: Any,
) -> Expected:
    """Normalizes and rotates ``x`` as ``rope::norm_apply`` should."""

    def rotate(x: Tensor, **rotation: Any) -> Expected:
        return apply(x, positions, inv_freq, **rotation)

    if inv_freq is not None:
        options = {**options, "rotary_dim": 2 * inv_freq.shape[-1]}
    return _normalize_and_rotate(x, weight, rotate, **options)


def norm_apply_cos_sin(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    **options: Any,
) -> Expected:
    """Normalizes and rotates ``x`` as ``rope::norm_apply_cos_sin`` should."""

    def rotate(x: Tensor, **rotation: Any) -> Expected:
        return apply_cos_sin(x, cos, sin, positions, **rotation)

    columns = cos.shape[-1] if options.get("full_width") else 2 * cos.shape[-1]
    return _normalize_and_rotate(x, weight, rotate, **{**options, "rotary_dim": columns})


def _normalize_and_rotate(
    x: Tensor,
    weight: Tensor | None,
    rotate: Callable[..., Expected],
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_axes: Sequence[int] | None = None,
    norm_last: bool = False,
    **rotation: Any,
) -> Expected:
    """Applies the norm before or after a rotation in float64."""
    axis = rotation.get("embedding_axis", -1) % x.dim()
    axes = [axis] if norm_axes is None else list(norm_axes)
    opmath = torch.float64 if x.dtype == torch.float64 else torch.float32
    eps = torch.tensor(eps, dtype=opmath).item()
    gain = torch.ones(x.shape[axis], dtype=torch.float64)
    if weight is not None:
        offset = torch.tensor(weight_offset, dtype=opmath).double()
        gain = weight.cpu().to(opmath).double() + offset
    # The dimensions of x, with the embedding axis in its place.
    gain = gain[(None,) * (x.dim() - gain.dim())].movedim(-1, axis)

    def reciprocal_root(values: Tensor) -> Tensor:
        return 1 / (values.square().mean(axes, keepdim=True) + eps).sqrt()

    values = x.cpu().double()
    error = NORM_FLOAT64_ERROR if x.dtype == torch.float64 else NORM_FLOAT32_ERROR
    if norm_last:
        rotated = rotate(values, **rotation)
        scale = reciprocal_root(rotated.values)
        results = rotated.values * scale * gain
        # What tables cancel is small, and its errors are not.
        noise = (rotated.norms * FLOAT32_ERROR).square().mean(axes, keepdim=True).sqrt() * scale
        error = error + (noise.clamp_min(FLOAT32_ERROR) - FLOAT32_ERROR)
    else:
        scale = reciprocal_root(values)
        rotated = rotate(values * scale, **rotation)
        results = rotate(values * scale * gain, **rotation).values
        scale = torch.ones_like(scale)
    # Without the error of a rotation in float64, what is left is that of the angle.
    of_angle = (rotated.tolerance - rotated.norms * FLOAT64_ERROR).clamp_min(0)
    larger = _larger_of_pair(gain.abs().broadcast_to(x.shape), axis, **rotation)
    in_slice = (error * rotated.norms + of_angle) * scale * larger
    outside = _outside_slice(x.shape[axis], **rotation)
    outside = outside[(...,) + (None,) * (x.dim() - 1 - axis)]
    tolerance = torch.where(outside, error * results.abs(), in_slice)
    return Expected(results, tolerance, rotated.norms * scale * larger)


def _slice_of_pairs(
    size: int,
    *,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Returns where the first and the second elements of the pairs are."""
    pairs = torch.arange((size - rotary_offset if rotary_dim is None else rotary_dim) // 2)
    first = rotary_offset + (2 * pairs if interleaved else pairs)
    return first, first + (1 if interleaved else len(pairs))


def _larger_of_pair(values: Tensor, axis: int, **rotation: Any) -> Tensor:
    """Gives both elements of a pair the larger of their values."""
    values = values.movedim(axis, -1).clone()
    first, second = _slice_of_pairs(values.shape[-1], **rotation)
    larger = torch.maximum(values[..., first], values[..., second])
    values[..., first] = larger
    values[..., second] = larger
    return values.movedim(-1, axis)


def _outside_slice(size: int, **rotation: Any) -> Tensor:
    """Returns which elements are not rotated."""
    outside = torch.ones(size, dtype=torch.bool)
    for places in _slice_of_pairs(size, **rotation):
        outside[places] = False
    return outside


class _Tables(NamedTuple):
    """A cosine and a sine for each of the two elements of a pair, with one column per pair."""

    cos_a: Tensor
    sin_a: Tensor
    cos_b: Tensor
    sin_b: Tensor


def _rotate(
    x: Tensor,
    tables: _Tables,
    error: Tensor,
    embedding_axis: int,
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
) -> Expected:
    """Rotates the pairs of ``x``, each by a 2 x 2 matrix, or by its transpose."""
    cos_a, sin_a, cos_b, sin_b = tables
    pairs = torch.arange(cos_a.shape[-1])
    first = rotary_offset + (2 * pairs if interleaved else pairs)
    second = first + (1 if interleaved else len(pairs))

    values = x.cpu().double().movedim(embedding_axis, -1)
    a, b = values[..., first], values[..., second]
    rotated = values.clone()
    from_b, from_a = (sin_b, -sin_a) if conjugate else (-sin_a, sin_b)
    rotated[..., first] = a * cos_a + b * from_b
    rotated[..., second] = b * cos_b + a * from_a

    norms, tolerance = torch.zeros_like(values), torch.zeros_like(values)
    for elements, cos, sin in ((first, cos_a, from_b), (second, cos_b, from_a)):
        norms[..., elements] = torch.hypot(a, b) * torch.hypot(cos, sin)
        tolerance[..., elements] = norms[..., elements] * error
    results = (rotated, tolerance, norms)
    return Expected(*(result.movedim(-1, embedding_axis) for result in results))


def half_ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the most that rounding a number of this magnitude to ``dtype`` can change it."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.clamp_min(info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(magnitude, info.eps / 4), exponent)


def assert_rotated(actual: Tensor, expected: Expected) -> None:
    """Asserts that ``actual`` is what was expected, each element rounded once."""
    values, tolerance, _ = expected
    assert actual.shape == values.shape
    rounding = half_ulp(values.abs() + tolerance, actual.dtype)
    allowed = torch.where(tolerance > 0, tolerance + rounding, 0.0)
    errors = (actual.cpu().double() - values).abs()
    wrong = ~(errors <= allowed)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at {index}: "
            f"{actual[index].item()!r} instead of {values[index].item()!r}, "
            f"off by {errors[index].item():.3g} where {allowed[index].item():.3g} is allowed"
        )


def bits(tensor: Tensor) -> Tensor:
    """Copies the elements of a floating-point tensor as integers of the same size, to the CPU."""
    copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copy.view(INTEGER_OF_SIZE[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Asserts that two tensors agree in dtype, shape and every bit of every element."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    differing = int((bits(actual) != bits(expected)).sum())
    assert differing == 0, f"{differing} of {actual.numel()} elements differ in their bits"


def random_values(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    seed: int = 0,
) -> Tensor:
    """Draws a normally distributed tensor that is the same on every device and in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)


def random_positions(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.int64,
    device: str = "cpu",
    *,
    low: int = -65536,
    high: int = 65536,
    seed: int = 0,
) -> Tensor:
    """Draws positions in ``[low, high)``, in eighths where the dtype has fractions."""
    generator = torch.Generator().manual_seed(seed)
    eighths = torch.randint(8 * low, 8 * high, shape, generator=generator)
    positions = eighths / 8 if dtype.is_floating_point else eighths // 8
    return positions.to(device, dtype)


def random_inv_freq(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    seed: int = 1,
) -> Tensor:
    """Draws frequencies between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=generator).to(device, dtype)
