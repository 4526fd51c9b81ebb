"""The functions of torchtitan's models that rotate, with their signatures.

A model takes them by assignment to the module that calls them, for example
``attention.apply_rotary_emb_complex = torchtitan.apply_rotary_emb_complex``.
"""

from torch import Tensor

from torch_rope._operators import apply_cos_sin

__all__ = [
    "apply_rotary_emb_complex",
    "apply_rotary_emb_cos_sin",
    "apply_rotary_emb_single_complex",
]


def apply_rotary_emb_complex(
    xq: Tensor, xk: Tensor, freqs_cis: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of neighbours in queries and keys (Llama 3, Llama 4).

    Args:
        xq: Queries of shape ``(batch, seqlen, heads, head_dim)``.
        xk: Keys of that shape; the number of heads may be another.
        freqs_cis: Complex table of shape ``(max_seqlen, head_dim / 2)``.
        positions: Rows of the table, int32 or int64 of shape ``(batch, seqlen)`` or
            ``(1, seqlen)``; by default 0, 1, 2...

    Returns:
        The rotated queries and keys, each of its own dtype.

    Raises:
        ValueError: If sizes do not fit.
        TypeError: If a dtype or a device does not fit.
        IndexError: If a position is beyond the table (on CUDA a device-side assertion).
    """
    cos, sin, rows = _rows(freqs_cis.real, freqs_cis.imag, xq, positions)
    return apply_cos_sin((xq, xk), cos, sin, rows, interleaved=True)


def apply_rotary_emb_single_complex(
    x: Tensor, freqs_cis: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Rotates pairs of neighbours in one tensor (DeepSeek-V3).

    Args:
        x: As ``xq`` of :func:`apply_rotary_emb_complex`.
        freqs_cis: As there.
        positions: As there.

    Returns:
        The rotated tensor.

    Raises:
        ValueError: If sizes do not fit.
        TypeError: If a dtype or a device does not fit.
        IndexError: If a position is beyond the table (on CUDA a device-side assertion).
    """
    cos, sin, rows = _rows(freqs_cis.real, freqs_cis.imag, x, positions)
    return apply_cos_sin(x, cos, sin, rows, interleaved=True)


def apply_rotary_emb_cos_sin(
    xq: Tensor, xk: Tensor, rope_cache: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of halves in queries and keys (Qwen3, GPT-OSS).

    The table is used in its own dtype, where torchtitan rounds it to that of ``xq`` first.

    Args:
        xq: As for :func:`apply_rotary_emb_complex`.
        xk: As there.
        rope_cache: Table of shape ``(max_seqlen, 2 * head_dim)``: cosines and sines, each of which
            holds its values twice.
        positions: As there.

    Returns:
        The rotated queries and keys, each of its own dtype.

    Raises:
        ValueError: If sizes do not fit.
        TypeError: If a dtype or a device does not fit.
        IndexError: If a position is beyond the table (on CUDA a device-side assertion).
    """
    cos, sin = (table[..., : xq.shape[-1] // 2] for table in rope_cache.chunk(2, dim=-1))
    cos, sin, rows = _rows(cos, sin, xq, positions)
    return apply_cos_sin((xq, xk), cos, sin, rows)


def _rows(
    cos: Tensor, sin: Tensor, x: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns tables that broadcast with x of shape (B, S, H, D), or positions that do."""
    if positions is not None:
        return cos, sin, positions.unsqueeze(-1)
    if cos.shape[0] < x.shape[1]:  # A single row would broadcast.
        raise ValueError(
            f"torch_rope.integrations.torchtitan: expected a table of at least {x.shape[1]} rows, "
            f"one for each token, but got {cos.shape[0]}"
        )
    return cos[: x.shape[1]].unsqueeze(1), sin[: x.shape[1]].unsqueeze(1), None


def __dir__() -> list[str]:
    return sorted(__all__)
