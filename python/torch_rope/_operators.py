"""The public functions: the operators of ``torch.ops.rope``, for a tensor or a ``(q, k)`` tuple."""

from collections.abc import Sized
from typing import TYPE_CHECKING, TypedDict, TypeVar, overload

from torch import Tensor
from torch.compiler import is_compiling
from torch.jit._builtins import _register_builtin
from torch.overrides import has_torch_function

from torch_rope import _C
from torch_rope import _visible as visible
from torch_rope._arguments import message

if TYPE_CHECKING:
    from typing_extensions import Unpack

Pair = tuple[Tensor, Tensor] | list[Tensor]
Rotated = TypeVar("Rotated", Tensor, tuple[Tensor, Tensor], list[Tensor])


class ApplyOptions(TypedDict, total=False):
    """The options of :func:`apply`, for type checkers."""

    embedding_axis: int
    rotary_dim: int | None
    rotary_offset: int
    max_wavelength: float
    scale_factor: float
    attention_factor: float
    interleaved: bool
    conjugate: bool


class CosSinOptions(TypedDict, total=False):
    """The options of :func:`apply_cos_sin`, for type checkers."""

    embedding_axis: int
    rotary_dim: int | None
    rotary_offset: int
    interleaved: bool
    conjugate: bool
    full_width: bool


@overload
def apply(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None = None,
    **options: "Unpack[ApplyOptions]",
) -> Tensor: ...


@overload
def apply(
    x: Pair, positions: Tensor, inv_freq: Tensor | None = None, **options: "Unpack[ApplyOptions]"
) -> tuple[Tensor, Tensor]: ...


def apply(
    x: Tensor | Pair,
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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Rotates pairs of elements of ``x`` by angles that grow with ``positions``.

    With ``N = rotary_dim / 2``, pair ``n`` of the rotated slice is ``(n, n + N)``, or
    ``(2n, 2n + 1)`` when ``interleaved``. A pair ``(a, b)`` with angle ``t`` becomes
    ``(a cos t - b sin t, b cos t + a sin t) * attention_factor`` (arXiv 2104.09864, equation 34).

    The angle of pair ``n`` at position ``p`` is, in radians,

    * without ``inv_freq``: ``p * max_wavelength ** (-2 * n / rotary_dim) / scale_factor``, formed
      in float64;
    * with ``inv_freq`` of shape ``(N,)``: ``p * inv_freq[n]``, formed in the dtype of ``inv_freq``;
    * with ``inv_freq`` of shape ``(A, N)``: the sum over ``a`` of
      ``positions[a] * inv_freq[a, n]``, formed in the dtype of ``inv_freq`` (several axes, such as
      time, height and width: M-RoPE, 2-D and 3-D RoPE).

    The cosine and sine of that angle are exact to 2.5e-7 (1e-12 for float64 ``x``) at any position.
    The opmath type is float32 (float64 for float64 ``x``), and each element of the result is
    rounded once.

    Args:
        x: Tensor of float64, float32, float16 or bfloat16, with any shape of at least one dimension
            and any strides; or a ``(q, k)`` tuple or list of them, which are rotated by the same
            angles in one launch and may differ in shape, strides and dtype. If neither
            ``rotary_dim`` nor ``inv_freq`` is given, their rotated slices must have the same size.
        positions: Token positions, int32, int64, float32 or float64, of any value, on the device of
            ``x``, broadcastable with the shape of ``x`` without ``embedding_axis``: ``(S, 1)`` or
            ``(B, S, 1)`` for ``x`` of shape ``(B, S, H, D)``, ``(S,)`` for ``(B, H, S, D)``. With
            ``inv_freq`` of shape ``(A, N)``, one more dimension of size ``A`` comes first. The
            layout is never guessed: ``(S,)`` for ``(B, S, H, D)`` is an error, unless there are as
            many heads as tokens: then it broadcasts, and rotates by head.
        inv_freq: Radians per unit of position, float32 or float64, of shape ``(N,)`` or ``(A, N)``.
            These are frequencies, not angles: if you have angles of shape ``(S, N)``, pass their
            cosines and sines to :func:`apply_cos_sin`.
        embedding_axis: The dimension of ``x`` that is rotated; negative counts from the end.
        rotary_dim: How many elements are rotated, even; by default ``2 * N`` of ``inv_freq``, or
            all from ``rotary_offset`` on. Elements outside are copied unchanged; 0 rotates none.
        rotary_offset: The first element that is rotated, at least 0.
        max_wavelength: The base of the frequencies, positive (``rope_theta`` of Hugging Face's
            configurations). Not together with ``inv_freq``.
        scale_factor: Divides the angle, positive (linear position interpolation). Not together with
            ``inv_freq``.
        attention_factor: Multiplies the rotated elements, finite (the attention scaling of YaRN).
        interleaved: Whether pairs are adjacent elements (GPT-J) instead of the two halves
            (GPT-NeoX, Llama).
        conjugate: Whether to rotate by the negative angle: the transpose, and the inverse if
            ``attention_factor`` is 1.

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(x)``; for a tuple, a tuple.

    Raises:
        ValueError: If a size or value is not accepted, such as positions that do not broadcast with
            ``x``.
        TypeError: If a dtype, a device or the type of an argument is not accepted.
        IndexError: If ``embedding_axis`` is out of range.
        NotImplementedError: If this build has no kernel for the device.

    Example:
        >>> import torch, torch_rope
        >>> q, k = torch.randn(2, 5, 8, 64), torch.randn(2, 5, 2, 64)  # (B, S, H, D)
        >>> positions = torch.arange(5).unsqueeze(-1)
        >>> q_rotated, k_rotated = torch_rope.apply((q, k), positions)
        >>> torch.allclose(torch_rope.apply(q_rotated, positions, conjugate=True), q, atol=1e-5)
        True
    """
    is_pair = type(x) is not Tensor and isinstance(x, (tuple, list))
    if is_pair and len(x) != 2:
        raise wrong_length("apply", x)
    tensors = (*x, positions, inv_freq) if is_pair else (x, positions, inv_freq)
    operators = visible if is_compiling() or has_torch_function(tensors) else _C
    rotate = operators.apply_qk if is_pair else operators.apply
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
    )
    return rotated


def apply_(
    x: Rotated,
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
) -> Rotated:
    """Rotates like :func:`apply`, in place.

    Under ``torch.compile`` use :func:`apply`: compiled graphs have no mutation, so this function
    becomes :func:`apply` followed by a copy into ``x``. For one layer of Llama-3-8B (512 tokens,
    bfloat16, one thread of a Xeon with AVX-512) the two take 0.27 ms (in place) and 0.48 ms in
    eager mode, and 0.97 ms (in place) and 0.56 ms compiled.

    Args:
        x: The tensor, or the ``(q, k)`` tuple or list of tensors, to rotate. No two elements may
            overlap in memory, within a tensor or between ``q`` and ``k``. Disjoint views of one
            packed buffer are fine.
        positions: Token positions. They and the options below have the shapes, dtypes, ranges and
            defaults given in :func:`apply`.
        inv_freq: Frequencies, in radians per unit of position.
        embedding_axis: The dimension of ``x`` that is rotated.
        rotary_dim: How many elements are rotated.
        rotary_offset: The first element that is rotated.
        max_wavelength: The base of the frequencies.
        scale_factor: Divides the angle.
        attention_factor: Multiplies the rotated elements.
        interleaved: Whether pairs are adjacent elements.
        conjugate: Whether to rotate by the negative angle.

    Returns:
        ``x``, rotated. In TorchScript nothing.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: In the cases listed for
            :func:`apply`, and ValueError if elements overlap. ``x`` is unchanged after any error.
        RuntimeError: If a leaf that requires grad is given while gradients are recorded.

    Example:
        >>> import torch, torch_rope
        >>> qkv = torch.randn(5, 3, 8, 64)  # sequence, (q, k, v), heads, head_dim
        >>> expected = torch_rope.apply(qkv[:, 0], torch.arange(5).unsqueeze(-1))
        >>> q, k = torch_rope.apply_((qkv[:, 0], qkv[:, 1]), torch.arange(5).unsqueeze(-1))
        >>> torch.equal(qkv[:, 0], expected)
        True
    """
    is_pair = type(x) is not Tensor and isinstance(x, (tuple, list))
    if is_pair and len(x) != 2:
        raise wrong_length("apply_", x)
    tensors = (*x, positions, inv_freq) if is_pair else (x, positions, inv_freq)
    operators = visible if is_compiling() or has_torch_function(tensors) else _C
    rotate = operators.apply_qk_ if is_pair else operators.apply_
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
    )
    return x


@overload
def apply_cos_sin(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    **options: "Unpack[CosSinOptions]",
) -> Tensor: ...


@overload
def apply_cos_sin(
    x: Pair,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    **options: "Unpack[CosSinOptions]",
) -> tuple[Tensor, Tensor]: ...


def apply_cos_sin(
    x: Tensor | Pair,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotates pairs of elements of ``x`` by the caller's tables of cosines and sines.

    A pair ``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)``. The tables are used as given,
    converted to the opmath type: float32, or float64 for float64 ``x``.

    With ``full_width`` the tables have a column for each element of the rotated slice instead of
    one for each pair, in the order of the slice, like those of Hugging Face's models and of
    diffusers. A pair becomes ``(a cos_a - b sin_a, b cos_b + a sin_b)``.

    Args:
        x: Tensor of float64, float32, float16 or bfloat16, with any shape of at least one dimension
            and any strides; or a ``(q, k)`` tuple or list of them, which are rotated in one launch
            and may differ in shape, strides and dtype.
        cos: Table of float64, float32, float16 or bfloat16, with any strides. Without ``positions``
            its shape is ``(..., N)`` with one column for each pair, where ``(...)`` broadcasts with
            the shape of ``x`` without ``embedding_axis``; with ``positions`` it is ``(P, N)``. With
            ``full_width`` there are ``2 * N`` columns. For a complex table (``freqs_cis``) pass its
            real part here, its imaginary part as ``sin``, and ``interleaved=True``.
        sin: Table of the shape, dtype and device of ``cos``.
        positions: Rows of the tables, int32 or int64 in ``[0, P)``, broadcastable with the shape of
            ``x`` without ``embedding_axis``.
        embedding_axis: The dimension of ``x`` that is rotated; negative counts from the end.
        rotary_dim: How many elements are rotated. It follows from the width of the tables: if
            given, it must be ``2 * N``. Give it to check the width, for instance in a model that
            rotates a part of each head.
        rotary_offset: The first of the ``2 * N`` elements that are rotated, at least 0. Elements
            outside are copied unchanged.
        interleaved: Whether pairs are adjacent elements (GPT-J) instead of the two halves
            (GPT-NeoX, Llama).
        conjugate: Whether to rotate by the negative angle: the transpose, with ``full_width``
            ``(a cos_a + b sin_b, b cos_b - a sin_a)``.
        full_width: Whether the tables have a column for each element instead of one for each pair.

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(x)``; for a tuple, a tuple.

    Raises:
        ValueError: If a size or value is not accepted.
        TypeError: If a dtype, a device or the type of an argument is not accepted.
        IndexError: If ``embedding_axis`` is out of range, or on CPU an element of ``positions``. On
            CUDA the latter trips a device-side assertion.
        NotImplementedError: If this build has no kernel for the device.

    Example:
        >>> import torch, torch_rope
        >>> x = torch.randn(2, 5, 8, 64)
        >>> angles = torch.arange(100).unsqueeze(-1) * 10000.0 ** (-torch.arange(32) / 32)
        >>> positions = torch.arange(5).unsqueeze(-1)
        >>> y = torch_rope.apply_cos_sin(x, angles.cos(), angles.sin(), positions)
        >>> torch.allclose(y, torch_rope.apply(x, positions), atol=1e-5)
        True
        >>> angles = torch.cat((angles, angles), dim=-1)  # as in Hugging Face's models
        >>> cos, sin = angles.cos()[:5, None], angles.sin()[:5, None]
        >>> torch.equal(torch_rope.apply_cos_sin(x, cos, sin, full_width=True), y)
        True
    """
    is_pair = type(x) is not Tensor and isinstance(x, (tuple, list))
    if is_pair and len(x) != 2:
        raise wrong_length("apply_cos_sin", x)
    tensors = (*x, cos, sin, positions) if is_pair else (x, cos, sin, positions)
    operators = visible if is_compiling() or has_torch_function(tensors) else _C
    rotate = operators.apply_cos_sin_qk if is_pair else operators.apply_cos_sin
    rotated: Tensor | tuple[Tensor, Tensor] = rotate(
        *tensors, embedding_axis, rotary_dim, rotary_offset, interleaved, conjugate, full_width
    )
    return rotated


def apply_cos_sin_(
    x: Rotated,
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
) -> Rotated:
    """Rotates like :func:`apply_cos_sin`, in place.

    Under ``torch.compile`` use :func:`apply_cos_sin`, for the reason given in :func:`apply_`.

    Args:
        x: The tensor, or the ``(q, k)`` tuple or list of tensors, to rotate. No two elements may
            overlap in memory, within a tensor or between ``q`` and ``k``. Disjoint views of one
            packed buffer are fine.
        cos: Table of cosines. It and the options below have the shapes, dtypes, ranges and defaults
            given in :func:`apply_cos_sin`.
        sin: Table of sines.
        positions: Rows of the tables.
        embedding_axis: The dimension of ``x`` that is rotated.
        rotary_dim: How many elements are rotated.
        rotary_offset: The first element that is rotated.
        interleaved: Whether pairs are adjacent elements.
        conjugate: Whether to rotate by the negative angle.
        full_width: Whether the tables have a column for each element instead of one for each pair.

    Returns:
        ``x``, rotated. In TorchScript nothing.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: In the cases listed for
            :func:`apply_cos_sin`, and ValueError if elements overlap. ``x`` is unchanged after any
            error, on CPU also if an element of ``positions`` is out of range.
        RuntimeError: If a leaf that requires grad is given while gradients are recorded.

    Example:
        >>> import torch, torch_rope
        >>> x = torch.tensor([1.0, 0.0])
        >>> torch_rope.apply_cos_sin_(x, torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0., 1.])
    """
    is_pair = type(x) is not Tensor and isinstance(x, (tuple, list))
    if is_pair and len(x) != 2:
        raise wrong_length("apply_cos_sin_", x)
    tensors = (*x, cos, sin, positions) if is_pair else (x, cos, sin, positions)
    operators = visible if is_compiling() or has_torch_function(tensors) else _C
    rotate = operators.apply_cos_sin_qk_ if is_pair else operators.apply_cos_sin_
    rotate(*tensors, embedding_axis, rotary_dim, rotary_offset, interleaved, conjugate, full_width)
    return x


def wrong_length(function: str, x: Sized) -> TypeError:
    """Returns the error for a tuple or list that is not ``(q, k)``."""
    kind = f"a {type(x).__name__} of {len(x)}"
    return TypeError(
        message(f"rope::{function}", "x", "be a tensor or a (q, k) tuple of two tensors", kind)
    )


# torch.jit.script compiles a call of these functions with one tensor to the operator itself.
for _function in (apply, apply_, apply_cos_sin, apply_cos_sin_):
    _register_builtin(_function, f"rope::{_function.__name__}")
