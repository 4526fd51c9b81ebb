"""Positions of tokens, formed on the device without a wait for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_rope._frequencies import default_device


def positions_from_cu_seqlens(cu_seqlens: Tensor, total_length: int) -> Tensor:
    """Numbers the tokens of packed sequences, each sequence from 0.

    Args:
        cu_seqlens: Where each sequence begins and the last one ends, int32 or int64 of shape
            ``(B + 1,)``, ascending from 0. Sequences may be empty.
        total_length: The number of tokens, given since reading it from the device would wait.
            Tokens beyond the last sequence (padding) are numbered as one more.

    Returns:
        Positions of shape ``(total_length,)`` and the dtype of ``cu_seqlens``.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.positions_from_cu_seqlens(torch.tensor([0, 3, 5]), 5)
        tensor([0, 1, 2, 0, 1])
    """
    positions: Tensor = torch.ops.rope._positions_from_cu_seqlens(cu_seqlens, total_length)
    return positions


def positions_from_attention_mask(attention_mask: Tensor) -> Tensor:
    """Numbers the tokens of padded sequences, each sequence from 0.

    Args:
        attention_mask: Whether each place holds a token (1 or True) or padding (0 or False), on
            whichever side: bool or integer of shape ``(..., S)``.

    Returns:
        int64 positions of the same shape. Padding has the position of the last token before it, or
        0.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.positions_from_attention_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
        tensor([[0, 0, 0, 1],
                [0, 1, 2, 3]])
    """
    positions: Tensor = torch.ops.rope._positions_from_attention_mask(attention_mask)
    return positions


def context_parallel_positions(
    seq_len: int,
    rank: int,
    world_size: int,
    *,
    zigzag: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gives the positions of the tokens that one rank holds of a sequence shared among ranks.

    Args:
        seq_len: The number of tokens of the sequence, a multiple of ``world_size`` (with
            ``zigzag`` of ``2 * world_size``).
        rank: This rank, in ``[0, world_size)``.
        world_size: The number of ranks.
        zigzag: Whether a rank holds two of ``2 * world_size`` chunks, the ``rank``-th from the
            front and the ``rank``-th from the back, which balances causal attention. Otherwise it
            holds one of ``world_size`` chunks.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        int64 positions of shape ``(seq_len / world_size,)``.

    Raises:
        ValueError: If the ranks cannot share the sequence equally, or ``rank`` is out of range.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.context_parallel_positions(8, 1, 2)
        tensor([4, 5, 6, 7])
        >>> torch_rope.context_parallel_positions(8, 1, 2, zigzag=True)
        tensor([2, 3, 4, 5])
    """
    positions: Tensor = torch.ops.rope._context_parallel_positions(
        seq_len, rank, world_size, zigzag, default_device(device)
    )
    return positions


def grid_positions(sizes: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """Gives the coordinates of the places of a grid: an image, a video.

    Args:
        sizes: The size of the grid along each axis, such as rows and columns, or frames, rows and
            columns.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        int64 coordinates of shape ``(A, *sizes)`` where ``A`` is the number of axes, for
        :func:`apply` with ``inv_freq`` of shape ``(A, N)``. Where tokens are in one dimension, row
        after row, take ``.flatten(1)``.

    Raises:
        ValueError: If there is no axis.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.grid_positions((2, 3)).flatten(1)
        tensor([[0, 0, 0, 1, 1, 1],
                [0, 1, 2, 0, 1, 2]])
    """
    positions: Tensor = torch.ops.rope._grid_positions(sizes, default_device(device))
    return positions
