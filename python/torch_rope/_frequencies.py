"""Frequencies: every scheme of Hugging Face configurations, and builders for several axes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_rope import _C
from torch_rope._arguments import (
    check_bool,
    check_dtype,
    check_integer,
    check_integers,
    check_number,
    check_tensor,
    kind_of,
    message,
)

# The keys that rope_parameters may have: those of every scheme, and three that callers pass on as
# other arguments (partial_rotary_factor, mrope_section, mrope_interleaved).
_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "short_factor",
    "long_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
    "mrope_section",
    "mrope_interleaved",
)

# Keys that only a whole configuration has, not its rope_parameters.
_KEYS_OF_CONFIGURATIONS = frozenset(
    [
        "architectures",
        "attention_head_dim",
        "d_model",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "kv_channels",
        "layer_types",
        "model_type",
        "n_embd",
        "n_head",
        "n_heads",
        "n_layer",
        "n_positions",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "qk_rope_head_dim",
        "rms_norm_eps",
        "rope_interleave",
        "rope_parameters",
        "rope_scaling",
        "rotary_dim",
        "rotary_emb_base",
        "rotary_pct",
        "text_config",
        "torch_dtype",
        "transformers_version",
        "vocab_size",
    ]
)


class Frequencies(NamedTuple):
    """The result of :func:`frequencies`.

    Attributes:
        inv_freq: Radians per unit of position, of shape ``(N,)``.
        attention_factor: Multiplies the rotated elements; 1 except for YaRN and LongRoPE.

    Example:
        >>> import torch_rope
        >>> result = torch_rope.frequencies({"rope_theta": 10000.0}, 64)
        >>> result.inv_freq.shape, result.attention_factor
        (torch.Size([32]), 1.0)
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
    """Computes the frequencies that a Hugging Face configuration describes.

    With ``f[n] = rope_theta ** (-2 * n / rotary_dim)``, the values of ``rope_type`` and the keys
    that each requires besides ``rope_theta``:

    * ``default``: ``f``.
    * ``linear``: ``f / factor``. Requires ``factor``.
    * ``dynamic`` (NTK): ``f`` with a ``rope_theta`` that grows with ``seq_len`` beyond
      ``max_position_embeddings``. Requires ``factor`` and ``max_position_embeddings``.
    * ``yarn`` (arXiv 2309.00071): from ``f`` for short wavelengths to ``f / factor`` for long ones.
      Requires ``factor`` and ``original_max_position_embeddings``; accepts ``attention_factor``,
      ``beta_fast``, ``beta_slow``, ``mscale``, ``mscale_all_dim`` and ``truncate``.
    * ``longrope`` (arXiv 2402.13753): ``f / long_factor`` if ``seq_len`` is greater than
      ``original_max_position_embeddings``, else ``f / short_factor``. Requires these three, and
      ``attention_factor``, ``factor`` or ``max_position_embeddings``.
    * ``llama3``: from ``f`` for short wavelengths to ``f / factor`` for long ones. Requires
      ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
      ``original_max_position_embeddings``.
    * ``proportional``: ``f / factor`` for the first ``partial_rotary_factor`` of the pairs, 0 for
      the rest. Accepts ``partial_rotary_factor`` and ``factor``, both 1 by default.

    float32 results match transformers' ``ROPE_INIT_FUNCTIONS`` on the CPU bit for bit, whatever
    ``device`` is; float64 results follow the formula.

    Args:
        rope_parameters: A dictionary with the keys above; ``rope_type`` (or its older name
            ``type``) defaults to ``default``. None counts as missing. Keys of other types are
            ignored, and so are ``mrope_section`` and ``mrope_interleaved``.
            ``max_position_embeddings`` is used if the argument is not given. Other keys are
            rejected: for a whole configuration, use :meth:`RotaryEmbedding.from_config`.
        rotary_dim: The number of rotated elements, positive and even; the result has half as many
            frequencies. For every type but ``proportional`` it must already include
            ``partial_rotary_factor``: ``int(head_dim * partial_rotary_factor)``.
        max_position_embeddings: The length that the model supports (``longrope``) or was trained
            with (``dynamic``).
        seq_len: The sequence length to compute the frequencies for (``dynamic`` and ``longrope``);
            by default within the trained length.
        dtype: float32 or float64.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        ``inv_freq`` of shape ``(rotary_dim / 2,)``, and ``attention_factor``.

    Raises:
        ValueError: If the type or a key is unknown, a key is missing, or a value is invalid.
        TypeError: If an argument or a value has the wrong type, or ``dtype`` is not float32 or
            float64.

    Example:
        >>> import torch, torch_rope
        >>> rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
        >>> inv_freq, attention_factor = torch_rope.frequencies(rope_parameters, 64)
        >>> inv_freq.shape, attention_factor
        (torch.Size([32]), 1.0)
        >>> y = torch_rope.apply(torch.randn(2, 5, 8, 64), torch.arange(5)[:, None], inv_freq)
    """
    function = "rope::frequencies"
    check_rope_parameters(function, rope_parameters)
    check_integer(function, "rotary_dim", rotary_dim)
    if max_position_embeddings is None:
        max_position_embeddings = rope_parameters.get("max_position_embeddings")
    if max_position_embeddings is not None:
        check_integer(function, "max_position_embeddings", max_position_embeddings)
    if seq_len is not None:
        check_integer(function, "seq_len", seq_len)
    check_dtype(function, dtype)
    return Frequencies(
        *_C.frequencies(
            dict(rope_parameters),
            rotary_dim,
            max_position_embeddings,
            seq_len,
            dtype,
            default_device(device, function),
        )
    )


def axial_frequencies(
    rotary_dims: Sequence[int],
    *,
    max_wavelength: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Computes frequencies for positions on a grid: an image's rows and columns, a video's frames.

    Each axis rotates its own elements, one axis after the other. With ``d = rotary_dims[a]``, axis
    ``a`` rotates ``d / 2`` pairs with the frequencies ``max_wavelength ** (-2 * n / d)`` (axial
    RoPE of arXiv 2403.13298, which uses a ``max_wavelength`` of 100).

    Args:
        rotary_dims: The number of elements that each axis rotates, positive and even.
        max_wavelength: The base of the frequencies, positive.
        dtype: float32 or float64.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        ``inv_freq`` of shape ``(A, N)`` for :func:`apply`, where ``A`` is the number of axes and
        ``2 * N`` the sum of ``rotary_dims``.

    Raises:
        ValueError: If a size or ``max_wavelength`` is invalid.
        TypeError: If an argument has the wrong type, or ``dtype`` is not float32 or float64.

    Example:
        >>> import torch, torch_rope
        >>> inv_freq = torch_rope.axial_frequencies((32, 32), max_wavelength=100.0)
        >>> positions = torch_rope.grid_positions((14, 14))
        >>> patches = torch.randn(2, 14, 14, 6, 64)  # (B, rows, columns, heads, head_dim)
        >>> torch_rope.apply(patches, positions.unsqueeze(-1), inv_freq).shape
        torch.Size([2, 14, 14, 6, 64])
    """
    function = "rope::axial_frequencies"
    check_integers(function, "rotary_dims", rotary_dims)
    check_number(function, "max_wavelength", max_wavelength)
    check_dtype(function, dtype)
    device = default_device(device, function)
    return _C.axial_frequencies(tuple(rotary_dims), max_wavelength, dtype, device)


def mrope_frequencies(
    inv_freq: Tensor, sections: Sequence[int], *, interleaved: bool = False
) -> Tensor:
    """Distributes the frequencies of one axis over several: M-RoPE (arXiv 2409.12191).

    Every pair keeps its frequency and follows the position along one axis (time, height, width).

    Args:
        inv_freq: Frequencies of shape ``(N,)``, float32 or float64, as from :func:`frequencies`.
        sections: The number of pairs of each axis; the sum is ``N`` (``mrope_section`` in Hugging
            Face configurations).
        interleaved: Whether the axes alternate (Qwen3-VL): of ``A`` axes, axis ``a`` has the pairs
            ``a``, ``a + A``, ``a + 2 * A``, ..., and axis 0 also has the remaining ones. Otherwise
            each axis has a contiguous section of pairs, in order (Qwen2-VL).

    Returns:
        ``inv_freq`` of shape ``(A, N)`` for :func:`apply`, with one nonzero number in each column.

    Raises:
        ValueError: If a shape or ``sections`` is invalid.
        TypeError: If an argument has the wrong type, or ``inv_freq`` is not float32 or float64.

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
    function = "rope::mrope_frequencies"
    check_tensor(function, "inv_freq", inv_freq)
    check_integers(function, "sections", sections)
    check_bool(function, "interleaved", interleaved)
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
    """Draws initial values for learned mixed frequencies of images (RoPE-ViT, arXiv 2403.13298).

    In each head the first ``rotary_dim / 4`` pairs have the frequencies ``max_wavelength ** (-4 * n
    / rotary_dim)`` along a random direction of the plane, the other pairs along the perpendicular
    direction.

    Args:
        rotary_dim: The number of rotated elements of a head, positive and a multiple of 4.
        num_heads: The number of heads, each with its own direction. With more than one, fold the
            heads into the rotated axis and use ``interleaved`` pairs, as below.
        max_wavelength: The base of the frequencies, positive.
        generator: The random number generator, on the CPU; by default PyTorch's.
        dtype: float32 or float64.
        device: The device of the result; by default PyTorch's default device.

    Returns:
        ``inv_freq`` of shape ``(2, num_heads * rotary_dim / 2)`` for :func:`apply`.

    Raises:
        ValueError: If a size or ``max_wavelength`` is invalid.
        TypeError: If an argument has the wrong type, or ``dtype`` is not float32 or float64.

    Example:
        >>> import torch, torch_rope
        >>> inv_freq = torch_rope.mixed_frequencies(64, num_heads=6).requires_grad_()
        >>> positions = torch_rope.grid_positions((14, 14)).flatten(1)  # (2, 196)
        >>> q = torch.randn(2, 196, 6, 64)
        >>> rotated = torch_rope.apply(q.flatten(-2), positions, inv_freq, interleaved=True)
        >>> rotated.unflatten(-1, (6, 64)).shape
        torch.Size([2, 196, 6, 64])
    """
    function = "rope::mixed_frequencies"
    check_integer(function, "rotary_dim", rotary_dim)
    check_integer(function, "num_heads", num_heads)
    check_number(function, "max_wavelength", max_wavelength)
    if not (generator is None or isinstance(generator, torch.Generator)):
        rule = "be a torch.Generator on the CPU"
        raise TypeError(message(function, "generator", rule, kind_of(generator)))
    check_dtype(function, dtype)
    return _C.mixed_frequencies(
        rotary_dim, num_heads, max_wavelength, generator, dtype, default_device(device, function)
    )


def default_device(
    device: torch.device | str | None, function: str = "torch.device"
) -> torch.device:
    """Returns the device that a factory function of PyTorch would use.

    Args:
        device: The caller's argument.
        function: The caller's public name, for errors.
    """
    if isinstance(device, torch.device):
        return device
    if device is None:
        # torch.compile cannot trace torch.get_default_device().
        return torch.empty(0).device
    if isinstance(device, bool) or not isinstance(device, str | int):
        raise TypeError(message(function, "device", "be a device", kind_of(device)))
    try:
        return torch.device(device)
    except RuntimeError:
        rule = "be a valid device"
        raise ValueError(message(function, "device", rule, repr(device))) from None


def check_rope_parameters(function: str, rope_parameters: Any, hint: str = "") -> None:
    """Raises unless ``rope_parameters`` is a dictionary of one scheme's parameters.

    Args:
        function: The caller's public name, for errors.
        rope_parameters: The caller's argument.
        hint: Appended to the message if the argument is a number.
    """
    if not isinstance(rope_parameters, Mapping):
        got = kind_of(rope_parameters)
        if isinstance(rope_parameters, int | float):
            got += hint
        elif hasattr(rope_parameters, "model_type"):
            got += " (for a configuration, use RotaryEmbedding.from_config)"
        raise TypeError(message(function, "rope_parameters", "be a dictionary", got))
    for key, value in rope_parameters.items():
        if key in _KEYS or value is None:
            continue
        if key in _KEYS_OF_CONFIGURATIONS:
            rule = (
                "be the parameters of one scheme (for a whole configuration, use "
                "RotaryEmbedding.from_config)"
            )
        elif isinstance(value, Mapping):
            rule = f"be those of one layer type (such as rope_parameters[{key!r}])"
        else:
            rule = f"have no keys but {', '.join(_KEYS)}"
        raise ValueError(message(function, "rope_parameters", rule, f"the key {key!r}"))
