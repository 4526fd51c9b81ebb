"""``apply_rotary_emb`` with flash-attn's signature, on CPU and CUDA."""

import torch
from torch import Tensor

from torch_rope._arguments import kind_of, message
from torch_rope._operators import apply_cos_sin, apply_cos_sin_
from torch_rope._positions import positions_from_cu_seqlens
from torch_rope.integrations._checks import check_dims, check_shape, check_whole_numbers

__all__ = ["apply_rotary_emb"]

_NAME = "torch_rope.integrations.flash_attn.apply_rotary_emb"


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first elements of each head, as ``flash_attn.layers.rotary`` does.

    Args:
        x: Tensor of shape ``(batch, seqlen, nheads, headdim)``; with ``cu_seqlens``, the
            concatenated sequences, ``(total_seqlen, nheads, headdim)``. Any dtype and strides that
            :func:`torch_rope.apply_cos_sin` accepts.
        cos: Table of shape ``(seqlen_rotary, rotary_dim / 2)``, of any floating-point dtype.
        sin: Table of the shape and dtype of ``cos``.
        interleaved: Whether pairs are adjacent elements (GPT-J) instead of halves (GPT-NeoX).
        inplace: Whether to rotate ``x`` in place.
        seqlen_offsets: The position of the first token: a number, or an int32 or int64 tensor of
            shape ``(batch,)``, such as the lengths of the cached keys.
        cu_seqlens: The start of each sequence and the end of the last, int32 or int64 of shape
            ``(batch + 1,)``. On a GPU its values are not checked.
        max_seqlen: Ignored; accepted for callers that pass it with ``cu_seqlens``.

    Returns:
        A tensor of the shape and dtype of ``x``; ``x`` itself if ``inplace``.

    Raises:
        ValueError: If a shape is wrong, or the tables have fewer rows than there are tokens.
        TypeError: If a type, a dtype or a device is wrong.
        IndexError: If a position is beyond the tables (on CUDA a device-side assertion).

    Example:
        >>> import torch
        >>> from torch_rope.integrations.flash_attn import apply_rotary_emb
        >>> angles = torch.arange(128).unsqueeze(-1) * 10000.0 ** (-torch.arange(32) / 32)
        >>> q = torch.randn(2, 1, 8, 64)  # one new token per sequence
        >>> lengths = torch.tensor([17, 90])
        >>> apply_rotary_emb(q, angles.cos(), angles.sin(), seqlen_offsets=lengths).shape
        torch.Size([2, 1, 8, 64])
    """
    _check(x, cos, sin, seqlen_offsets, cu_seqlens)
    rotate = apply_cos_sin_ if inplace else apply_cos_sin
    if cu_seqlens is not None:
        positions = positions_from_cu_seqlens(cu_seqlens, x.shape[0])
        if isinstance(seqlen_offsets, Tensor):
            tokens = torch.arange(x.shape[0], device=x.device)
            sequence = torch.bucketize(tokens, cu_seqlens[1:-1], right=True)
            seqlen_offsets = seqlen_offsets[sequence]
        positions = positions + seqlen_offsets
    elif isinstance(seqlen_offsets, Tensor):
        positions = seqlen_offsets.unsqueeze(-1) + torch.arange(x.shape[1], device=x.device)
    else:
        end = seqlen_offsets + x.shape[1]
        if seqlen_offsets < 0 or end > cos.shape[0]:  # A single row would broadcast.
            rule = f"have the rows from {seqlen_offsets} to {end}"
            raise ValueError(message(_NAME, "cos", rule, f"{cos.shape[0]} rows"))
        cos, sin = (table[seqlen_offsets:end].unsqueeze(1) for table in (cos, sin))
        return rotate(x, cos, sin, interleaved=interleaved)
    return rotate(x, cos, sin, positions.unsqueeze(-1), interleaved=interleaved)


def _check(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> None:
    packed = cu_seqlens is not None
    heads = ("nheads", "headdim")
    check_dims(_NAME, "x", x, ("total_seqlen", *heads) if packed else ("batch", "seqlen", *heads))
    check_dims(_NAME, "cos", cos, ("seqlen_rotary", "rotary_dim / 2"))
    check_dims(_NAME, "sin", sin, ("seqlen_rotary", "rotary_dim / 2"))
    check_shape(_NAME, "sin", sin, cos.shape)
    if cu_seqlens is not None:
        check_dims(_NAME, "cu_seqlens", cu_seqlens, ("batch + 1",))
        check_whole_numbers(_NAME, "cu_seqlens", cu_seqlens)
        if cu_seqlens.shape[0] == 0:
            raise ValueError(message(_NAME, "cu_seqlens", "have an element", "none"))
    if isinstance(seqlen_offsets, Tensor):
        check_whole_numbers(_NAME, "seqlen_offsets", seqlen_offsets)
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_shape(_NAME, "seqlen_offsets", seqlen_offsets, (batch,))
    elif isinstance(seqlen_offsets, bool) or not isinstance(seqlen_offsets, int | torch.SymInt):
        rule = "be an integer or a tensor of integers"
        raise TypeError(message(_NAME, "seqlen_offsets", rule, kind_of(seqlen_offsets)))


def __dir__() -> list[str]:
    return sorted(__all__)
