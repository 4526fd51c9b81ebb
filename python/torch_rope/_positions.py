"""Positions of tokens, computed on the device without synchronisation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._jit_internal import is_scripting

from torch_rope._arguments import check_bool, check_integer, check_integers, check_tensor
from torch_rope._frequencies import default_device


def positions_from_cu_seqlens(cu_seqlens: Tensor, total_length: int) -> Tensor:
    """Numbers the tokens of packed sequences, each sequence from 0.

    On CPU the values of ``cu_seqlens`` are checked. On other devices, in compiled programs and
    under ``torch.vmap`` they are not, since that would synchronise or is impossible: values that do
    not ascend from 0 to at most ``total_length`` give meaningless positions there.

    Args:
        cu_seqlens: The start of each sequence and the end of the last, int32 or int64 of shape
            ``(B + 1,)``, ascending from 0. Sequences may be empty.
        total_length: The number of tokens, an argument since reading it from the device would
            synchronise. Tokens after the last sequence (padding) are numbered as one more.

    Returns:
        Positions of shape ``(total_length,)`` and the dtype of ``cu_seqlens``.

    Raises:
        ValueError: If ``cu_seqlens`` does not have one dimension, or is empty; if
            ``total_length`` is negative; on CPU, if ``cu_seqlens`` does not begin with 0, descends,
            or ends after ``total_length``.
        TypeError: If ``cu_seqlens`` is not an int32 or int64 tensor, or ``total_length`` is not an
            integer.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.positions_from_cu_seqlens(torch.tensor([0, 3, 5]), 5)
        tensor([0, 1, 2, 0, 1])
    """
    if not is_scripting():
        check_tensor("rope::positions_from_cu_seqlens", "cu_seqlens", cu_seqlens)
        check_integer("rope::positions_from_cu_seqlens", "total_length", total_length)
    positions: Tensor = torch.ops.rope._positions_from_cu_seqlens(cu_seqlens, total_length)
    return positions


def positions_from_attention_mask(attention_mask: Tensor, packed: bool = False) -> Tensor:
    """Numbers the tokens of padded sequences, each sequence from 0.

    Args:
        attention_mask: True or nonzero for tokens, False or 0 for padding, on either side: bool or
            integer of shape ``(..., S)``. For an additive mask (0 and ``-inf``) pass ``mask == 0``.
        packed: Whether the mask numbers the samples packed into a row, as in ``[[1, 1, 2, 2, 2,
            0]]``. Each run of equal numbers is then a sample and starts at position 0.

    Returns:
        int64 positions of the same shape. Padding gets the position of the last token before it, or
        0; with ``packed`` always 0.

    Raises:
        ValueError: If ``attention_mask`` is 0-dimensional.
        TypeError: If ``attention_mask`` is not a bool or integer tensor, or ``packed`` is not a
            bool.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.positions_from_attention_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
        tensor([[0, 0, 0, 1],
                [0, 1, 2, 3]])
        >>> samples = torch.tensor([[1, 1, 2, 2, 2, 0]])
        >>> torch_rope.positions_from_attention_mask(samples)
        tensor([[0, 1, 2, 3, 4, 4]])
        >>> torch_rope.positions_from_attention_mask(samples, packed=True)
        tensor([[0, 1, 0, 1, 2, 0]])
    """
    if not is_scripting():
        check_tensor("rope::positions_from_attention_mask", "attention_mask", attention_mask)
        check_bool("rope::positions_from_attention_mask", "packed", packed)
    positions: Tensor = torch.ops.rope._positions_from_attention_mask(attention_mask, packed)
    return positions


def context_parallel_positions(
    seq_len: int,
    rank: int,
    world_size: int,
    *,
    zigzag: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Returns the positions of one rank's tokens of a sequence that is split over ranks.

    Args:
        seq_len: The length of the whole sequence, a multiple of ``world_size`` (with ``zigzag``, of
            ``2 * world_size``).
        rank: This rank, in ``[0, world_size)``.
        world_size: The number of ranks.
        zigzag: Whether a rank holds two of ``2 * world_size`` chunks, the ``rank``-th from the
            front and the ``rank``-th from the back, which balances causal attention. Otherwise it
            holds one of ``world_size`` chunks.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        int64 positions of shape ``(seq_len / world_size,)``.

    Raises:
        ValueError: If the sequence cannot be split equally, ``world_size`` is not positive, or
            ``rank`` is out of range.
        TypeError: If ``seq_len``, ``rank`` or ``world_size`` is not an integer, or ``zigzag`` is
            not a bool.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.context_parallel_positions(8, 1, 2)
        tensor([4, 5, 6, 7])
        >>> torch_rope.context_parallel_positions(8, 1, 2, zigzag=True)
        tensor([2, 3, 4, 5])
    """
    function = "rope::context_parallel_positions"
    check_integer(function, "seq_len", seq_len)
    check_integer(function, "rank", rank)
    check_integer(function, "world_size", world_size)
    check_bool(function, "zigzag", zigzag)
    positions: Tensor = torch.ops.rope._context_parallel_positions(
        seq_len, rank, world_size, zigzag, default_device(device)
    )
    return positions


def grid_positions(sizes: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """Returns the coordinates of the points of a grid: an image, a video.

    Args:
        sizes: The size of the grid along each axis, such as rows and columns, or frames, rows and
            columns.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        int64 coordinates of shape ``(A, *sizes)``, where ``A`` is the number of axes, for
        :func:`apply` with ``inv_freq`` of shape ``(A, N)``. For tokens in one dimension, row by
        row, use ``.flatten(1)``.

    Raises:
        ValueError: If ``sizes`` is empty or has a negative number.
        TypeError: If ``sizes`` is not a sequence of integers.

    Example:
        >>> import torch, torch_rope
        >>> torch_rope.grid_positions((2, 3)).flatten(1)
        tensor([[0, 0, 0, 1, 1, 1],
                [0, 1, 2, 0, 1, 2]])
    """
    check_integers("rope::grid_positions", "sizes", sizes)
    positions: Tensor = torch.ops.rope._grid_positions(sizes, default_device(device))
    return positions
