"""RMSNorm and rotation in one: the functions of the family ``norm_apply``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor
from torch.compiler import is_compiling
from torch.jit._builtins import _register_builtin
from torch.overrides import has_torch_function

from torch_rope import _C
from torch_rope import _visible as visible
from torch_rope._arguments import kind_of, message
from torch_rope._operators import ApplyOptions, CosSinOptions, Pair, wrong_length

if TYPE_CHECKING:
    from typing_extensions import Unpack

Weights = tuple[Tensor | None, Tensor | None] | list[Tensor | None]
Rotated = TypeVar("Rotated", Tensor, tuple[Tensor, Tensor], list[Tensor])


class NormOptions(ApplyOptions, total=False):
    """The options of :func:`norm_apply`, for type checkers."""

    eps: float
    weight_offset: float
    norm_axes: Sequence[int] | None
    norm_last: bool


class NormCosSinOptions(CosSinOptions, total=False):
    """The options of :func:`norm_apply_cos_sin`, for type checkers."""

    eps: float
    weight_offset: float
    norm_axes: Sequence[int] | None
    norm_last: bool


@overload
def norm_apply(
    x: Tensor,
    weight: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor | None = None,
    **options: "Unpack[NormOptions]",
) -> Tensor: ...


@overload
def norm_apply(
    x: Pair,
    weight: Weights | None,
    positions: Tensor,
    inv_freq: Tensor | None = None,
    **options: "Unpack[NormOptions]",
) -> tuple[Tensor, Tensor]: ...


def norm_apply(
    x: Tensor | Pair,
    weight: Tensor | Weights | None,
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
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_axes: Sequence[int] | None = None,
    norm_last: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Normalizes ``x`` by its root mean square and rotates it, in one pass over memory.

    With ``n = x / sqrt(mean(x ** 2) + eps)`` (RMSNorm, arXiv 1910.07467), the result is
    ``rotate(n * (weight_offset + weight))``, where ``rotate`` is :func:`apply`. With ``norm_last``
    it is ``(weight_offset + weight) * z / sqrt(mean(z ** 2) + eps)`` for ``z = rotate(x)``.

    The norm is that of the whole embedding axis, including elements outside the rotated slice,
    which are normalized and weighted but not rotated. All is computed in the opmath type, float32
    (float64 for float64 ``x``), and each element is rounded once. Modules that also round the
    normalized elements, and those they rotate, differ by these roundings. Where the squares or
    their sum overflow in that type, the result is zero. Where they underflow and ``eps`` is 0 in
    that type, it is infinite or NaN.

    Training saves ``x``, the weight and what makes the angles, and nothing else. The gradients of
    ``x`` and of the weight take one pass over memory, and are the same in every run.

    Args:
        x: Tensor of float64, float32, float16 or bfloat16, with any shape of at least one dimension
            and any strides; or a ``(q, k)`` tuple or list of them, as in :func:`apply`.
        weight: None, or a tensor of float64, float32, float16 or bfloat16 and of shape
            ``(..., D)``, where ``D`` is the size of the embedding axis and ``(...)`` broadcasts
            with the shape of ``x`` without ``embedding_axis``: ``(D,)``, ``(H, D)`` for ``x`` of
            shape ``(B, S, H, D)``, ``(H, 1, D)`` for ``(B, H, S, D)``. For ``(q, k)``, None or a
            ``(q_weight, k_weight)`` tuple or list, each a tensor or None.
        positions: Token positions. They and the options down to ``conjugate`` have the shapes,
            dtypes, ranges and defaults given in :func:`apply`.
        inv_freq: Frequencies, in radians per unit of position.
        embedding_axis: The dimension of ``x`` that is rotated and normalized.
        rotary_dim: How many elements are rotated; 0 makes this an RMSNorm alone.
        rotary_offset: The first element that is rotated.
        max_wavelength: The base of the frequencies.
        scale_factor: Divides the angle.
        attention_factor: Multiplies the rotated elements.
        interleaved: Whether pairs are adjacent elements.
        conjugate: Whether to rotate by the negative angle.
        eps: Added to the mean, finite and at least 0.
        weight_offset: Added to the weight, finite: 1 for Gemma's norms. Without a weight it is
            ignored.
        norm_axes: The dimensions whose elements share one mean, distinct, with the embedding axis
            among them; by default that alone. Negative ones count from the end, of ``q`` and of
            ``k``. ``(-2, -1)`` for ``x`` of shape ``(B, S, H, D)`` is the norm over all heads of a
            token (OLMo 2).
        norm_last: Whether to normalize after the rotation (HunYuan) instead of before it.

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(x)``; for a tuple, a tuple.

    Raises:
        ValueError: If a size or value is not accepted, such as a weight that does not broadcast
            with ``x``.
        TypeError: If a dtype, a device or the type of an argument is not accepted.
        IndexError: If ``embedding_axis`` or one of ``norm_axes`` is out of range.
        NotImplementedError: If this build has no kernel for the device.

    Example:
        >>> import torch, torch_rope
        >>> q, k = torch.randn(2, 5, 8, 64), torch.randn(2, 5, 2, 64)  # (B, S, H, D)
        >>> q_weight, k_weight = torch.rand(64), torch.rand(64)
        >>> positions = torch.arange(5).unsqueeze(-1)
        >>> q2, k2 = torch_rope.norm_apply((q, k), (q_weight, k_weight), positions)
        >>> normalized = torch.nn.functional.rms_norm(q, (64,), q_weight, eps=1e-6)
        >>> torch.allclose(q2, torch_rope.apply(normalized, positions), atol=1e-5)
        True
    """
    is_pair = type(x) is not Tensor and isinstance(x, (tuple, list))
    if is_pair:
        if len(x) != 2:
            raise wrong_length("norm_apply", x)
        tensors = (*x, *_weights("norm_apply_qk", weight), positions, inv_freq)
    else:
        tensors = (x, weight, positions, inv_freq)
    operators = visible if is_compiling() or has_torch_function(tensors) else _C
    rotate = operators.norm_apply_qk if is_pair else operators.norm_apply
    rotated: Tensor | tuple[Tensor, Tensor] = rotate(
        *tensors,
        embedding_axis,
        rotary_dim,
        rotary_offset,
        max_wavelength,
        scale_factor,
        attention_factor,
        interleaved,
        conjugate,
        eps,
        weight_offset,
        norm_axes,
        norm_last,
    )
    return rotated


def norm_apply_(
    x: Rotated,
    weight: Tensor | Weights | None,
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
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_axes: Sequence[int] | None = None,
    norm_last: bool = False,
) -> Rotated:
    """Normalizes and rotates like :func:`norm_apply`, in place.

    Where gradients are recorded, a copy of ``x`` is made and saved. Under ``torch.compile`` use
    :func:`norm_apply`, for the reason given in :func:`apply_`.

    Args:
        x: The tensor, or the ``(q, k)`` tuple or list of tensors. No two elements may overlap in
            memory, within a tensor or between ``q`` and ``k``. Disjoint views of one packed buffer
            are fine.
        weight: The weight, or the weights. They, the positions and the options below have the
            shapes, dtypes, ranges and defaults given in :func:`norm_apply`.
        positions: Token positions.
        inv_freq: Frequencies, in radians per unit of position.
        embedding_axis: The dimension of ``x`` that is rotated and normalized.
        rotary_dim: How many elements are rotated.
        rotary_offset: The first element that is rotated.
        max_wavelength: The base of the frequencies.
        scale_factor: Divides the angle.
        attention_factor: Multiplies the rotated elements.
        interleaved: Whether pairs are adjacent elements.
        conjugate: Whether to rotate by the negative angle.
        eps: Added to the mean.
        weight_offset: Added to the weight.
        norm_axes: The dimensions whose elements share one mean.
        norm_last: Whether to normalize after the rotation instead of before it.

    Returns:
        ``x``, normalized and rotated. In TorchScript nothing.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: In the cases listed for
            :func:`norm_apply`, and ValueError if elements overlap. ``x`` is unchanged after any
            error.
        RuntimeError: If a leaf that requires grad is given while gradients are recorded.

    Example:
        >>> import torch, torch_rope
        >>> qkv, weight = torch.randn(5, 3, 8, 64), torch.rand(64)  # sequence, (q, k, v), heads
        >>> positions = torch.arange(5).unsqueeze(-1)
        >>> expected = torch_rope.norm_apply(qkv[:, 0], weight, positions)
        >>> q, k = torch_rope.norm_apply_((qkv[:, 0], qkv[:, 1]), (weight, None), positions)
        >>> torch.equal(qkv[:, 0], expected)
        True
    """
    is_pair = type(x) is not Tensor and isinstance(x, (tuple, list))
    if is_pair:
        if len(x) != 2:
            raise wrong_length("norm_apply_", x)
        tensors = (*x, *_weights("norm_apply_qk_", weight), positions, inv_freq)
    else:
        tensors = (x, weight, positions, inv_freq)
    operators = visible if is_compiling() or has_torch_function(tensors) else _C
    rotate = operators.norm_apply_qk_ if is_pair else operators.norm_apply_
    rotate(
        *tensors,
        embedding_axis,
        rotary_dim,
        rotary_offset,
        max_wavelength,
        scale_factor,
        attention_factor,
        interleaved,
        conjugate,
        eps,
        weight_offset,
        norm_axes,
        norm_last,
    )
    return x


@overload
def norm_apply_cos_sin(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    **options: "Unpack[NormCosSinOptions]",
) -> Tensor: ...


@overload
def norm_apply_cos_sin(
    x: Pair,
    weight: Weights | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    **options: "Unpack[NormCosSinOptions]",
) -> tuple[Tensor, Tensor]: ...


def norm_apply_cos_sin(
    x: Tensor | Pair,
    weight: Tensor | Weights | None,
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
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_axes: Sequence[int] | None = None,
    norm_last: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalizes and rotates by the caller's tables of cosines and sines, in one pass over memory.

    The norm is that of :func:`norm_apply`, the rotation that of :func:`apply_cos_sin`.

    Args:
        x: Tensor of float64, float32, float16 or bfloat16, with any shape of at least one dimension
            and any strides; or a ``(q, k)`` tuple or list of them.
        weight: The weight, or the weights, as in :func:`norm_apply`.
        cos: Table of cosines. The tables, the positions and the options down to ``full_width`` have
            the shapes, dtypes, ranges and defaults given in :func:`apply_cos_sin`.
        sin: Table of sines, like ``cos``.
        positions: Rows of the tables.
        embedding_axis: The dimension of ``x`` that is rotated and normalized.
        rotary_dim: How many elements are rotated.
        rotary_offset: The first element that is rotated.
        interleaved: Whether pairs are adjacent elements.
        conjugate: Whether to rotate by the negative angle.
        full_width: Whether the tables have a column for each element instead of one for each pair.
        eps: Added to the mean. It and the options below are those of :func:`norm_apply`.
        weight_offset: Added to the weight.
        norm_axes: The dimensions whose elements share one mean.
        norm_last: Whether to normalize after the rotation instead of before it.

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(x)``; for a tuple, a tuple.

    Raises:
        ValueError: If a size or value is not accepted.
        TypeError: If a dtype, a device or the type of an argument is not accepted.
        IndexError: If ``embedding_axis`` or one of ``norm_axes`` is out of range, or on CPU an
            element of ``positions``. On CUDA the latter trips a device-side assertion.
        NotImplementedError: If this build has no kernel for the device.

    Example:
        >>> import torch, torch_rope
        >>> x, weight = torch.randn(2, 5, 8, 64), torch.rand(64)
        >>> angles = torch.arange(5).unsqueeze(-1) * 10000.0 ** (-torch.arange(32) / 32)
        >>> cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        >>> y = torch_rope.norm_apply_cos_sin(x, weight, cos, sin)
        >>> expected = torch_rope.norm_apply(x, weight, torch.arange(5).unsqueeze(-1))
        >>> torch.allclose(y, expected, atol=1e-5)
        True
    """
    is_pair = type(x) is not Tensor and isinstance(x, (tuple, list))
    if is_pair:
        if len(x) != 2:
            raise wrong_length("norm_apply_cos_sin", x)
        tensors = (*x, *_weights("norm_apply_cos_sin_qk", weight), cos, sin, positions)
    else:
        tensors = (x, weight, cos, sin, positions)
    operators = visible if is_compiling() or has_torch_function(tensors) else _C
    rotate = operators.norm_apply_cos_sin_qk if is_pair else operators.norm_apply_cos_sin
    rotated: Tensor | tuple[Tensor, Tensor] = rotate(
        *tensors,
        embedding_axis,
        rotary_dim,
        rotary_offset,
        interleaved,
        conjugate,
        full_width,
        eps,
        weight_offset,
        norm_axes,
        norm_last,
    )
    return rotated


def norm_apply_cos_sin_(
    x: Rotated,
    weight: Tensor | Weights | None,
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
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_axes: Sequence[int] | None = None,
    norm_last: bool = False,
) -> Rotated:
    """Normalizes and rotates like :func:`norm_apply_cos_sin`, in place.

    Where gradients are recorded, a copy of ``x`` is made and saved. Under ``torch.compile`` use
    :func:`norm_apply_cos_sin`, for the reason given in :func:`apply_`.

    Args:
        x: The tensor, or the ``(q, k)`` tuple or list of tensors. No two elements may overlap in
            memory, within a tensor or between ``q`` and ``k``. Disjoint views of one packed buffer
            are fine.
        weight: The weight, or the weights. They, the tables and the options below have the shapes,
            dtypes, ranges and defaults given in :func:`norm_apply` and :func:`apply_cos_sin`.
        cos: Table of cosines.
        sin: Table of sines.
        positions: Rows of the tables.
        embedding_axis: The dimension of ``x`` that is rotated and normalized.
        rotary_dim: How many elements are rotated.
        rotary_offset: The first element that is rotated.
        interleaved: Whether pairs are adjacent elements.
        conjugate: Whether to rotate by the negative angle.
        full_width: Whether the tables have a column for each element instead of one for each pair.
        eps: Added to the mean.
        weight_offset: Added to the weight.
        norm_axes: The dimensions whose elements share one mean.
        norm_last: Whether to normalize after the rotation instead of before it.

    Returns:
        ``x``, normalized and rotated. In TorchScript nothing.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: In the cases listed for
            :func:`norm_apply_cos_sin`, and ValueError if elements overlap. ``x`` is unchanged after
            any error.
        RuntimeError: If a leaf that requires grad is given while gradients are recorded.

    Example:
        >>> import torch, torch_rope
        >>> x, weight = torch.randn(5, 64), torch.rand(64)
        >>> cos, sin = torch.randn(5, 32), torch.randn(5, 32)
        >>> expected = torch_rope.norm_apply_cos_sin(x, weight, cos, sin)
        >>> torch.equal(torch_rope.norm_apply_cos_sin_(x, weight, cos, sin), expected)
        True
    """
    is_pair = type(x) is not Tensor and isinstance(x, (tuple, list))
    if is_pair:
        if len(x) != 2:
            raise wrong_length("norm_apply_cos_sin_", x)
        tensors = (*x, *_weights("norm_apply_cos_sin_qk_", weight), cos, sin, positions)
    else:
        tensors = (x, weight, cos, sin, positions)
    operators = visible if is_compiling() or has_torch_function(tensors) else _C
    rotate = operators.norm_apply_cos_sin_qk_ if is_pair else operators.norm_apply_cos_sin_
    rotate(
        *tensors,
        embedding_axis,
        rotary_dim,
        rotary_offset,
        interleaved,
        conjugate,
        full_width,
        eps,
        weight_offset,
        norm_axes,
        norm_last,
    )
    return x


def _weights(function: str, weight: Any) -> Weights:
    """Returns the weights of ``q`` and ``k``."""
    if weight is None:
        return (None, None)
    if isinstance(weight, (tuple, list)) and len(weight) == 2:
        return weight
    kind = kind_of(weight)
    got = f"a {kind} of {len(weight)}" if isinstance(weight, (tuple, list)) else kind
    rule = "be a (q_weight, k_weight) tuple or None"
    raise TypeError(message(f"rope::{function}", "weight", rule, got))


# torch.jit.script compiles a call of these functions with one tensor to the operator itself.
for _function in (norm_apply, norm_apply_, norm_apply_cos_sin, norm_apply_cos_sin_):
    _register_builtin(_function, f"rope::{_function.__name__}")
