"""Converts projection weights between the two pair conventions."""

import torch
from torch import Tensor

from torch_rope._arguments import check_integer, check_tensor


def permute_half_to_interleaved(
    weight: Tensor, head_dim: int, *, rotary_dim: int | None = None, rotary_offset: int = 0
) -> Tensor:
    """Permutes the output rows of a q or k projection from half-split to interleaved pairs.

    A model with half-split pairs (GPT-NeoX, Hugging Face's Llama) computes the same attention with
    the permuted projections and ``interleaved=True``.

    Args:
        weight: The weight of the projection, of shape ``(num_heads * head_dim, ...)``, or its bias,
            ``(num_heads * head_dim,)``.
        head_dim: The number of elements of a head.
        rotary_dim: The number of rotated elements of a head, even; by default all from
            ``rotary_offset`` on. The other rows keep their places.
        rotary_offset: The first rotated element.

    Returns:
        A copy with each head's rows permuted: pair ``n`` is in rows ``2 * n`` and ``2 * n + 1`` of
        the rotated slice.

    Raises:
        ValueError: If ``head_dim`` is not positive or does not divide the number of rows; if
            ``rotary_dim`` is odd or negative; if ``rotary_offset`` is negative, or the slice
            extends beyond the head.
        TypeError: If ``weight`` is not a tensor, or a size is not an integer.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.permute_half_to_interleaved(torch.arange(8), 8)
        tensor([0, 4, 1, 5, 2, 6, 3, 7])
    """
    _check("rope::permute_half_to_interleaved", weight, head_dim, rotary_dim, rotary_offset)
    permuted: Tensor = torch.ops.rope._permute_half_to_interleaved(
        weight, head_dim, rotary_dim, rotary_offset
    )
    return permuted


def permute_interleaved_to_half(
    weight: Tensor, head_dim: int, *, rotary_dim: int | None = None, rotary_offset: int = 0
) -> Tensor:
    """Permutes the output rows of a q or k projection from interleaved to half-split pairs.

    The inverse of :func:`permute_half_to_interleaved`, for models with adjacent pairs (GPT-J,
    Meta's Llama).

    Args:
        weight: The weight of the projection, of shape ``(num_heads * head_dim, ...)``, or its bias,
            ``(num_heads * head_dim,)``.
        head_dim: The number of elements of a head.
        rotary_dim: The number of rotated elements of a head, even; by default all from
            ``rotary_offset`` on.
        rotary_offset: The first rotated element.

    Returns:
        A copy with each head's rows permuted: pair ``n`` is in rows ``n`` and
        ``n + rotary_dim / 2`` of the rotated slice.

    Raises:
        ValueError: If a size is invalid, as for :func:`permute_half_to_interleaved`.
        TypeError: If ``weight`` is not a tensor, or a size is not an integer.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.permute_interleaved_to_half(torch.arange(8), 8)
        tensor([0, 2, 4, 6, 1, 3, 5, 7])
    """
    _check("rope::permute_interleaved_to_half", weight, head_dim, rotary_dim, rotary_offset)
    permuted: Tensor = torch.ops.rope._permute_interleaved_to_half(
        weight, head_dim, rotary_dim, rotary_offset
    )
    return permuted


def _check(
    function: str, weight: Tensor, head_dim: int, rotary_dim: int | None, rotary_offset: int
) -> None:
    hint = " (for a layer, pass its .weight)" if isinstance(weight, torch.nn.Module) else ""
    check_tensor(function, "weight", weight, hint)
    check_integer(function, "head_dim", head_dim)
    if rotary_dim is not None:
        check_integer(function, "rotary_dim", rotary_dim)
    check_integer(function, "rotary_offset", rotary_offset)
