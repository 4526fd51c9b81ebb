"""Weights of projections, between the two conventions of which elements form a pair."""

import torch
from torch import Tensor

from torch_rope._arguments import check_integer, check_tensor


def permute_half_to_interleaved(
    weight: Tensor, head_dim: int, *, rotary_dim: int | None = None, rotary_offset: int = 0
) -> Tensor:
    """Orders the outputs of a q or k projection for interleaved pairs.

    A model whose pairs are halves (GPT-NeoX, Llama of Hugging Face) computes the same attention
    with the permuted projections and ``interleaved=True``.

    Args:
        weight: The weight of the projection, of shape ``(num_heads * head_dim, ...)``, or its bias,
            ``(num_heads * head_dim,)``.
        head_dim: The number of elements of a head.
        rotary_dim: How many elements of a head are rotated, even; by default all from
            ``rotary_offset`` on. The others stay where they are.
        rotary_offset: The first element that is rotated.

    Returns:
        A copy with other rows in each head: those of pair ``n`` are ``2 * n`` and ``2 * n + 1``.

    Raises:
        ValueError: If ``head_dim`` is not positive or does not divide the rows; if ``rotary_dim``
            is odd or negative; if ``rotary_offset`` is negative, or the slice ends beyond the head.
        TypeError: If ``weight`` is not a tensor, or a number not an integer.

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
    """Orders the outputs of a q or k projection for pairs that are halves.

    The inverse of :func:`permute_half_to_interleaved`, for models whose pairs are adjacent (GPT-J,
    Llama of Meta).

    Args:
        weight: As for :func:`permute_half_to_interleaved`.
        head_dim: As for :func:`permute_half_to_interleaved`.
        rotary_dim: As for :func:`permute_half_to_interleaved`.
        rotary_offset: As for :func:`permute_half_to_interleaved`.

    Returns:
        A copy with other rows in each head: those of pair ``n`` are ``n`` and
        ``n + rotary_dim / 2``.

    Raises:
        ValueError: As for :func:`permute_half_to_interleaved`.
        TypeError: As for :func:`permute_half_to_interleaved`.

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
    hint = " (of a layer, its .weight)" if isinstance(weight, torch.nn.Module) else ""
    check_tensor(function, "weight", weight, hint)
    check_integer(function, "head_dim", head_dim)
    if rotary_dim is not None:
        check_integer(function, "rotary_dim", rotary_dim)
    check_integer(function, "rotary_offset", rotary_offset)
