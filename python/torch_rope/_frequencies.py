"""Frequencies: every scheme of Hugging Face's configurations, and builders for several axes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_rope import _C


class Frequencies(NamedTuple):
    """What :func:`frequencies` returns.

    Attributes:
        inv_freq: Radians per unit of position, of shape ``(N,)``.
        attention_factor: What rotated elements are multiplied by; 1 but for YaRN and LongRoPE.
    """

    inv_freq: Tensor
    attention_factor: float


def frequencies(
    rope_parameters: Mapping[str, Any],
    rotary_dim: int,
    *,
    max_position_embeddings: int | None = None,
    seq_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Frequencies:
    """Forms the frequencies that a Hugging Face configuration describes.

    With ``f[n] = rope_theta ** (-2 * n / rotary_dim)``, the values of ``rope_type`` and the keys
    that each needs besides ``rope_theta``:

    * ``default``: ``f``.
    * ``linear``: ``f / factor``. Needs ``factor``.
    * ``dynamic`` (NTK): ``f`` with a ``rope_theta`` that grows with ``seq_len`` beyond
      ``max_position_embeddings``. Needs ``factor`` and ``max_position_embeddings``.
    * ``yarn`` (arXiv 2309.00071): from ``f`` for short wavelengths to ``f / factor`` for long ones.
      Needs ``factor`` and ``original_max_position_embeddings``; takes ``attention_factor``,
      ``beta_fast``, ``beta_slow``, ``mscale``, ``mscale_all_dim`` and ``truncate``.
    * ``longrope`` (arXiv 2402.13753): ``f / long_factor`` where ``seq_len`` is greater than
      ``original_max_position_embeddings``, else ``f / short_factor``. Needs these three, and
      ``attention_factor``, ``factor`` or ``max_position_embeddings``.
    * ``llama3``: from ``f`` for short wavelengths to ``f / factor`` for long ones. Needs
      ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
      ``original_max_position_embeddings``.
    * ``proportional``: ``f / factor`` for the first ``partial_rotary_factor`` of the pairs, 0 for
      the others. Takes ``partial_rotary_factor`` and ``factor``, both 1 by default.

    float32 results have the bits of transformers' ``ROPE_INIT_FUNCTIONS`` on the CPU, whatever
    ``device`` is; float64 results are the formula.

    Args:
        rope_parameters: The dictionary, with the keys above; ``rope_type`` (or its older name
            ``type``) is ``default`` where it is missing. A value of None is a missing key; other
            keys are ignored.
        rotary_dim: The number of elements that are rotated, positive and even, of which the result
            has half. For every type but ``proportional``, ``partial_rotary_factor`` must have gone
            into it: ``int(head_dim * partial_rotary_factor)``.
        max_position_embeddings: The length that the model is for (``longrope``), or was trained
            with (``dynamic``).
        seq_len: The length of the sequences to come, for ``dynamic`` and ``longrope``; by default
            within the trained length.
        dtype: float32 or float64.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        ``inv_freq`` of shape ``(rotary_dim / 2,)``, and ``attention_factor``.

    Raises:
        ValueError: If the type is unknown, a key is missing, or a value does not fit.
        TypeError: If a value or ``dtype`` is of the wrong type.

    Example:
        >>> import torch, torch_rope
        >>> rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
        >>> inv_freq, attention_factor = torch_rope.frequencies(rope_parameters, 64)
        >>> inv_freq.shape, attention_factor
        (torch.Size([32]), 1.0)
        >>> y = torch_rope.apply(torch.randn(2, 5, 8, 64), torch.arange(5)[:, None], inv_freq)
    """
    return Frequencies(
        *_C.frequencies(
            dict(rope_parameters),
            rotary_dim,
            max_position_embeddings,
            seq_len,
            dtype,
            default_device(device),
        )
    )


def axial_frequencies(
    rotary_dims: Sequence[int],
    *,
    max_wavelength: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Forms frequencies for positions on a grid: rows and columns of an image, frames of a video.

    Each axis turns elements of its own. With ``d = rotary_dims[a]``, axis ``a`` turns the ``d / 2``
    pairs after those of the axes before it, with the frequencies ``max_wavelength ** (-2 * n / d)``
    (axial RoPE of arXiv 2403.13298, there with a ``max_wavelength`` of 100).

    Args:
        rotary_dims: The number of elements that each axis turns, positive and even.
        max_wavelength: The base of the frequencies, positive.
        dtype: float32 or float64.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        ``inv_freq`` of shape ``(A, N)`` for :func:`apply`, where ``A`` is the number of axes and
        ``2 * N`` the sum of ``rotary_dims``.

    Raises:
        ValueError: If a size or ``max_wavelength`` does not fit.
        TypeError: If ``dtype`` is another.

    Example:
        >>> import torch, torch_rope
        >>> inv_freq = torch_rope.axial_frequencies((32, 32), max_wavelength=100.0)
        >>> positions = torch_rope.grid_positions((14, 14))
        >>> patches = torch.randn(2, 14, 14, 6, 64)  # (B, rows, columns, heads, head_dim)
        >>> torch_rope.apply(patches, positions.unsqueeze(-1), inv_freq).shape
        torch.Size([2, 14, 14, 6, 64])
    """
    return _C.axial_frequencies(tuple(rotary_dims), max_wavelength, dtype, default_device(device))


def mrope_frequencies(
    inv_freq: Tensor, sections: Sequence[int], *, interleaved: bool = False
) -> Tensor:
    """Shares the frequencies of one axis among several: M-RoPE (arXiv 2409.12191).

    Every pair keeps its frequency and turns with the position along one axis (time, height, width).

    Args:
        inv_freq: Frequencies of shape ``(N,)``, as from :func:`frequencies`.
        sections: How many pairs turn with each axis, with the sum ``N`` (``mrope_section`` of
            Hugging Face's configurations).
        interleaved: Whether the axes take turns (Qwen3-VL): of ``A`` axes, axis ``a`` has the
            pairs ``a``, ``a + A``, ``a + 2 * A``, ..., and axis 0 also those that are left over.
            Otherwise each axis has the pairs after those of the axes before it (Qwen2-VL).

    Returns:
        ``inv_freq`` of shape ``(A, N)`` for :func:`apply`, with one number other than 0 in each
        column.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch, torch_rope
        >>> inv_freq, _ = torch_rope.frequencies({"rope_theta": 1e6}, 128)
        >>> inv_freq = torch_rope.mrope_frequencies(inv_freq, (16, 24, 24))
        >>> positions = torch.arange(5).expand(3, 5).unsqueeze(-1)  # text: all axes are alike
        >>> q = torch.randn(2, 5, 8, 128)
        >>> torch.allclose(
        ...     torch_rope.apply(q, positions, inv_freq),
        ...     torch_rope.apply(q, torch.arange(5).unsqueeze(-1), max_wavelength=1e6),
        ...     atol=1e-5,
        ... )
        True
    """
    return _C.mrope_frequencies(inv_freq, tuple(sections), interleaved)


def mixed_frequencies(
    rotary_dim: int,
    *,
    num_heads: int = 1,
    max_wavelength: float = 10.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws what learned mixed frequencies of an image start from (RoPE-ViT, arXiv 2403.13298).

    A head has the frequencies ``max_wavelength ** (-4 * n / rotary_dim)`` along a random direction
    of the plane for its first ``rotary_dim / 4`` pairs, and along the direction at a right angle
    to it for the others.

    Args:
        rotary_dim: The number of elements of a head that are rotated, positive and a multiple of 4.
        num_heads: The number of heads, each with a direction of its own. With more than one, the
            heads are folded into the rotated axis, and pairs are ``interleaved``: as below.
        max_wavelength: The base of the frequencies, positive.
        generator: The source of chance, on the CPU; by default PyTorch's own.
        dtype: float32 or float64.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        ``inv_freq`` of shape ``(2, num_heads * rotary_dim / 2)`` for :func:`apply`.

    Raises:
        ValueError: If a size or ``max_wavelength`` does not fit.
        TypeError: If ``dtype`` is another.

    Example:
        >>> import torch, torch_rope
        >>> inv_freq = torch_rope.mixed_frequencies(64, num_heads=6).requires_grad_()
        >>> positions = torch_rope.grid_positions((14, 14)).flatten(1)  # (2, 196)
        >>> q = torch.randn(2, 196, 6, 64)
        >>> rotated = torch_rope.apply(q.flatten(-2), positions, inv_freq, interleaved=True)
        >>> rotated.unflatten(-1, (6, 64)).shape
        torch.Size([2, 196, 6, 64])
    """
    return _C.mixed_frequencies(
        rotary_dim, num_heads, max_wavelength, generator, dtype, default_device(device)
    )


def default_device(device: torch.device | str | None) -> torch.device:
    """Returns the device that a factory function of PyTorch would use."""
    # Not torch.get_default_device(), which torch.compile cannot trace.
    return torch.empty(0).device if device is None else torch.device(device)
