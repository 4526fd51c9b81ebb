"""The rotation functions of torchtitan's models, with their signatures.

Assign them to the module that calls them, for example
``attention.apply_rotary_emb_complex = torchtitan.apply_rotary_emb_complex``.
"""

from torch import Tensor

from torch_rope._arguments import message
from torch_rope._operators import apply_cos_sin
from torch_rope.integrations._checks import (
    check_dims,
    check_shape,
    check_whole_numbers,
    dtype_of,
)

__all__ = [
    "apply_rotary_emb_complex",
    "apply_rotary_emb_cos_sin",
    "apply_rotary_emb_single_complex",
]

_PACKAGE = "torch_rope.integrations.torchtitan"


def apply_rotary_emb_complex(
    xq: Tensor, xk: Tensor, freqs_cis: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotates interleaved pairs of queries and keys (Llama 3, Llama 4).

    Args:
        xq: Queries of shape ``(batch, seqlen, heads, head_dim)``.
        xk: Keys of the same shape; the number of heads may differ.
        freqs_cis: Complex table of shape ``(max_seqlen, head_dim / 2)``.
        positions: Rows of the table, int32 or int64 of shape ``(batch, seqlen)`` or
            ``(1, seqlen)``; by default 0, 1, 2...

    Returns:
        The rotated queries and keys, with their own dtypes.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a type, a dtype or a device is wrong.
        IndexError: If a position is beyond the table (on CUDA a device-side assertion).

    Example:
        >>> import torch
        >>> from torch_rope.integrations.torchtitan import apply_rotary_emb_complex
        >>> angles = torch.arange(128)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
        >>> freqs_cis = torch.polar(torch.ones_like(angles), angles)
        >>> xq, xk = torch.randn(2, 5, 8, 64), torch.randn(2, 5, 2, 64)
        >>> xq_rotated, xk_rotated = apply_rotary_emb_complex(xq, xk, freqs_cis)
        >>> xk_rotated.shape
        torch.Size([2, 5, 2, 64])
    """
    name = f"{_PACKAGE}.apply_rotary_emb_complex"
    _check({"xq": xq, "xk": xk}, "freqs_cis", freqs_cis, positions, name)
    _check_complex(freqs_cis, xq, name)
    cos, sin, rows = _rows(freqs_cis.real, freqs_cis.imag, xq, positions)
    return apply_cos_sin((xq, xk), cos, sin, rows, interleaved=True)


def apply_rotary_emb_single_complex(
    x: Tensor, freqs_cis: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Rotates interleaved pairs of one tensor (DeepSeek-V3).

    Args:
        x: Like ``xq`` of :func:`apply_rotary_emb_complex`.
        freqs_cis: As for :func:`apply_rotary_emb_complex`.
        positions: As for :func:`apply_rotary_emb_complex`.

    Returns:
        The rotated tensor.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a type, a dtype or a device is wrong.
        IndexError: If a position is beyond the table (on CUDA a device-side assertion).

    Example:
        >>> import torch
        >>> from torch_rope.integrations.torchtitan import apply_rotary_emb_single_complex
        >>> angles = torch.arange(128)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
        >>> freqs_cis = torch.polar(torch.ones_like(angles), angles)
        >>> apply_rotary_emb_single_complex(torch.randn(2, 5, 1, 64), freqs_cis).shape
        torch.Size([2, 5, 1, 64])
    """
    name = f"{_PACKAGE}.apply_rotary_emb_single_complex"
    _check({"x": x}, "freqs_cis", freqs_cis, positions, name)
    _check_complex(freqs_cis, x, name)
    cos, sin, rows = _rows(freqs_cis.real, freqs_cis.imag, x, positions)
    return apply_cos_sin(x, cos, sin, rows, interleaved=True)


def apply_rotary_emb_cos_sin(
    xq: Tensor, xk: Tensor, rope_cache: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotates half-split pairs of queries and keys (Qwen3, GPT-OSS).

    The table is used in its own dtype; torchtitan first rounds it to the dtype of ``xq``.

    Args:
        xq: As for :func:`apply_rotary_emb_complex`.
        xk: As for :func:`apply_rotary_emb_complex`.
        rope_cache: Table of shape ``(max_seqlen, 2 * head_dim)``: cosines, then sines, with
            one column per element of a head.
        positions: As for :func:`apply_rotary_emb_complex`.

    Returns:
        The rotated queries and keys, with their own dtypes.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a type, a dtype or a device is wrong.
        IndexError: If a position is beyond the table (on CUDA a device-side assertion).

    Example:
        >>> import torch
        >>> from torch_rope.integrations.torchtitan import apply_rotary_emb_cos_sin
        >>> angles = torch.arange(128)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
        >>> angles = torch.cat((angles, angles), dim=-1)
        >>> rope_cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
        >>> xq, xk = torch.randn(2, 5, 8, 64), torch.randn(2, 5, 2, 64)
        >>> xq_rotated, xk_rotated = apply_rotary_emb_cos_sin(xq, xk, rope_cache)
        >>> xk_rotated.shape
        torch.Size([2, 5, 2, 64])
    """
    name = f"{_PACKAGE}.apply_rotary_emb_cos_sin"
    _check({"xq": xq, "xk": xk}, "rope_cache", rope_cache, positions, name)
    check_shape(name, "rope_cache", rope_cache, (rope_cache.shape[0], 2 * xq.shape[-1]))
    cos, sin = rope_cache.chunk(2, dim=-1)
    cos, sin, rows = _rows(cos, sin, xq, positions)
    return apply_cos_sin((xq, xk), cos, sin, rows, full_width=True)


def _check(
    rotated: dict[str, Tensor],
    argument: str,
    table: Tensor,
    positions: Tensor | None,
    name: str,
) -> None:
    """Checks what the operators cannot: arguments that are reshaped on the way to them."""
    for tensor_name, tensor in rotated.items():
        check_dims(name, tensor_name, tensor, ("batch", "seqlen", "heads", "head_dim"))
    check_dims(name, argument, table, ("max_seqlen", "columns"))
    batch, tokens = next(iter(rotated.values())).shape[:2]
    if positions is not None:
        check_dims(name, "positions", positions, ("batch", "seqlen"))
        check_whole_numbers(name, "positions", positions)
        check_shape(name, "positions", positions, (batch, tokens), (1, tokens))
    elif table.shape[0] < tokens:  # A single row would broadcast.
        rule = f"have at least {tokens} rows, one for each token"
        raise ValueError(message(name, argument, rule, f"{table.shape[0]} rows"))


def _check_complex(freqs_cis: Tensor, x: Tensor, name: str) -> None:
    if not freqs_cis.is_complex():
        raise TypeError(message(name, "freqs_cis", "be complex", dtype_of(freqs_cis)))
    check_shape(name, "freqs_cis", freqs_cis, (freqs_cis.shape[0], x.shape[-1] // 2))


def _rows(
    cos: Tensor, sin: Tensor, x: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns tables that broadcast with x of shape (B, S, H, D), or positions that do."""
    if positions is not None:
        return cos, sin, positions.unsqueeze(-1)
    return cos[: x.shape[1]].unsqueeze(1), sin[: x.shape[1]].unsqueeze(1), None


def __dir__() -> list[str]:
    return sorted(__all__)
