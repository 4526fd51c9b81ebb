"""Exports the operators to ONNX, as the standard RotaryEmbedding where possible.

Apply :func:`decompositions` to a ``torch.export`` program before ``torch.onnx.export``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.functional import embedding
from torch.onnx.ops import rotary_embedding

__all__ = ["decompositions"]


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Returns decompositions into operators that ``torch.onnx.export`` supports.

    A call becomes the standard RotaryEmbedding of opset 23 if ``x`` has four dimensions, is not
    float64, and is rotated in the last dimension from element 0 on, and all heads share the tables
    or positions: ``(S, N)`` or ``(B, 1, S, N)`` for ``x`` of shape ``(B, H, S, D)``, ``(S, 1, N)``
    or ``(B, S, 1, N)`` for ``(B, S, H, D)``; positions have these shapes without ``N``. Other calls
    become plain operators, including those with ``full_width`` tables, which may have two angles
    per pair. Both use the angles and the precision of the operators: float32 (float64 for float64
    ``x``).

    There are no decompositions of the in-place operators: export the functional ones.

    Returns:
        The table for ``torch.export.ExportedProgram.run_decompositions``.

    Example:
        >>> import torch, torch_rope
        >>> from torch_rope.integrations.onnx import decompositions
        >>> class Rotate(torch.nn.Module):
        ...     def forward(self, x, positions):
        ...         return torch_rope.apply(x, positions)
        >>> program = torch.export.export(Rotate(), (torch.randn(2, 8, 5, 64), torch.arange(5)))
        >>> program = program.run_decompositions(decompositions())
        >>> model = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False)
        >>> "RotaryEmbedding" in [node.op_type for node in model.model.graph]
        True
    """
    ops = torch.ops.rope
    return {
        ops.apply.default: _apply,
        ops.apply_qk.default: _apply_qk,
        ops.apply_cos_sin.default: _apply_cos_sin,
        ops.apply_cos_sin_qk.default: _apply_cos_sin_qk,
    }


def _apply(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None = None,
    *,
    embedding_axis: int = -1,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    **angle: Any,
) -> Tensor:
    tokens = (
        positions.shape[1:] if inv_freq is not None and inv_freq.dim() == 2 else positions.shape
    )
    if not _is_standard(x, tokens, embedding_axis, rotary_offset):
        plain: Tensor = torch.ops.rope.apply_composed(
            x,
            positions,
            inv_freq,
            embedding_axis=embedding_axis,
            rotary_dim=rotary_dim,
            rotary_offset=rotary_offset,
            interleaved=interleaved,
            **angle,
        )
        return plain
    if rotary_dim is None:
        rotary_dim = x.shape[-1] if inv_freq is None else 2 * inv_freq.shape[-1]
    # Rotating the pair (1, 0) gives the cosine and sine.
    one = positions.new_ones((*tokens, rotary_dim // 2), dtype=torch.float32)
    pair = torch.cat((one, torch.zeros_like(one)), dim=-1)
    rotated = torch.ops.rope.apply_composed(pair, positions, inv_freq, **angle)
    cos, sin = rotated.chunk(2, dim=-1)
    return _rotary_embedding(x, cos, sin, interleaved)


def _apply_cos_sin(
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
) -> Tensor:
    tokens = cos.shape[:-1] if positions is None else positions.shape
    if full_width or not _is_standard(x, tokens, embedding_axis, rotary_offset):
        plain: Tensor = torch.ops.rope.apply_cos_sin_composed(
            x,
            cos,
            sin,
            positions,
            embedding_axis=embedding_axis,
            rotary_dim=rotary_dim,
            rotary_offset=rotary_offset,
            interleaved=interleaved,
            conjugate=conjugate,
            full_width=full_width,
        )
        return plain
    if positions is not None:
        cos, sin = embedding(positions, cos), embedding(positions, sin)
    cos, sin = cos.float(), sin.float()
    return _rotary_embedding(x, cos, -sin if conjugate else sin, interleaved)


def _apply_qk(q: Tensor, k: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _apply(q, *arguments, **options), _apply(k, *arguments, **options)


def _apply_cos_sin_qk(
    q: Tensor, k: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    return _apply_cos_sin(q, *arguments, **options), _apply_cos_sin(k, *arguments, **options)


def _is_standard(x: Tensor, tokens: Sequence[int], embedding_axis: int, rotary_offset: int) -> bool:
    """Returns whether RotaryEmbedding can express a call with angles of shape ``tokens``."""
    return (
        x.dim() == 4
        and embedding_axis in (-1, 3)
        and rotary_offset == 0
        and x.dtype != torch.float64
        and _dimension_of_heads(x, tokens) is not None
    )


def _dimension_of_heads(x: Tensor, tokens: Sequence[int]) -> int | None:
    """Returns the dimension of x over which angles are shared, 1 or 2, or None."""
    sizes = (*(1 for _ in range(3 - len(tokens))), *tokens)
    # A symbolic size may not be 1, and merging heads takes a known number of them.
    if isinstance(sizes[1], int) and sizes[1] == 1:
        return 1
    if isinstance(sizes[2], int) and sizes[2] == 1 and isinstance(x.shape[2], int):
        return 2
    return None


def _rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates by float32 tables that broadcast with x."""
    batch, heads_or_tokens, tokens_or_heads, width = x.shape
    pairs = cos.shape[-1]
    options: dict[str, Any] = {
        "interleaved": interleaved,
        "rotary_embedding_dim": 0 if 2 * pairs == width else 2 * pairs,
    }
    if _dimension_of_heads(x, cos.shape[:-1]) == 1:
        cos, sin = (t.expand(batch, 1, tokens_or_heads, pairs).squeeze(1) for t in (cos, sin))
        return rotary_embedding(x.float(), cos, sin, **options).to(x.dtype)
    cos, sin = (t.expand(batch, heads_or_tokens, 1, pairs).squeeze(2) for t in (cos, sin))
    merged = x.float().flatten(2)
    rotated = rotary_embedding(merged, cos, sin, num_heads=tokens_or_heads, **options)
    return rotated.reshape(x.shape).to(x.dtype)


def __dir__() -> list[str]:
    return sorted(__all__)
