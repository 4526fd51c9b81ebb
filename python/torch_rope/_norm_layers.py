"""The layer that normalizes and rotates queries and keys."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from torch_rope._arguments import (
    check_bool,
    check_integer,
    check_integers,
    check_number,
    kind_of,
    message,
)
from torch_rope._config import read_config
from torch_rope._layers import MAX_WAVELENGTH, RotaryEmbedding
from torch_rope._norm_config import read_norms
from torch_rope._norm_operators import norm_apply

_NAME = "torch_rope.QKNormRotaryEmbedding"

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Names of the norms in checkpoints (HunYuan; LFM 2; IDEFICS).
_OTHER_NAMES = {
    "q_norm": ("query_layernorm", "q_layernorm", "q_layer_norm"),
    "k_norm": ("key_layernorm", "k_layernorm", "k_layer_norm"),
}


class NormWeight(nn.Module):
    """Holds the weight of an RMSNorm, or None; the layer around it computes the norm.

    Args:
        shape: What the weight has to be viewed as to broadcast with queries or keys. The parameter
            has one dimension, as in models.
        neutral: The initial value of its elements.
        exists: Whether there is a weight.
        device: The device of the weight; by default PyTorch's default device.
        dtype: The dtype of the weight; by default PyTorch's default dtype.
    """

    if TYPE_CHECKING:  # torch.jit.trace cannot view an attribute that is declared optional.
        weight: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        neutral: float,
        exists: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.shape = list(shape)
        self.neutral = neutral
        if exists:
            empty = torch.empty(math.prod(shape), device=device, dtype=dtype)
            self.weight = nn.Parameter(empty)
            self.reset_parameters()
        else:
            self.register_parameter("weight", None)

    def viewed(self) -> Tensor | None:
        """Returns the weight in the shape that broadcasts."""
        weight = self.weight
        if weight is None or len(self.shape) == 1:
            return weight
        return weight.view(self.shape)

    def reset_parameters(self) -> None:
        """Makes the weight neutral: ones, or zeros if 1 is added to it."""
        if self.weight is not None:
            nn.init.constant_(self.weight, self.neutral)

    def extra_repr(self) -> str:
        """Shows the size."""
        return "no weight" if self.weight is None else str(math.prod(self.shape))


class QKNormRotaryEmbedding(RotaryEmbedding):
    """Holds frequencies and norm weights; normalizes and rotates queries and keys by them.

    This is :class:`RotaryEmbedding` with :func:`norm_apply` instead of :func:`apply`. The weights
    are ``q_norm.weight`` and ``k_norm.weight``, as in the checkpoints of most models. They are
    converted by ``module.to(dtype)``, unlike the frequencies. Checkpoints may also call the norms
    ``query_layernorm``, ``q_layernorm`` or ``q_layer_norm``, and those of keys likewise.

    With one tensor, ``layer(x, positions)`` and ``rotate`` take queries; ``rotate_key`` takes keys.

    Args:
        rotary_dim: The number of rotated elements, even. It, ``rope_parameters`` and the options
            down to ``device`` are those of :class:`RotaryEmbedding`.
        rope_parameters: The scheme of the frequencies.
        max_position_embeddings: As for :func:`frequencies`.
        max_wavelength: The base of the frequencies, if ``rope_parameters`` has no ``rope_theta``.
        inv_freq: Frequencies to use instead of a scheme.
        attention_factor: Multiplies the rotated elements; by default the scheme's.
        learned: Whether the frequencies are a parameter.
        embedding_axis: The dimension to normalize and rotate.
        rotary_offset: The first rotated element.
        interleaved: Whether pairs are adjacent elements instead of the two halves.
        dtype: The dtype of a scheme's frequencies, float32 or float64.
        device: The device of frequencies and weights.
        head_dim: The size of the embedding axis; by default ``rotary_offset + rotary_dim``.
        eps: Added to the mean of the squares, finite and at least 0.
        weight_offset: Added to the weights, finite: 1 for Gemma 3 and Qwen3-Next.
        norm_axes: The dimensions whose elements share one mean; by default the embedding axis.
        norm_last: Whether to normalize after the rotation (HunYuan) instead of before it.
        num_heads: For norms over all heads (OLMo 2), the numbers of query and key heads. Weights
            then have ``num_heads * head_dim`` elements. ``norm_axes`` are by default ``(-2, -1)``,
            for ``(B, S, H, D)``; for ``(B, H, S, D)`` pass ``(-3, -1)``.
        q_weight: Whether the norm of queries has a weight.
        k_weight: Whether the norm of keys has a weight.
        weight_dtype: The dtype of the weights; by default PyTorch's default dtype.

    Raises:
        ValueError: If options are invalid or contradict each other, and as for
            :class:`RotaryEmbedding`.
        TypeError: If an option has the wrong type, and as for :class:`RotaryEmbedding`.

    Example:
        >>> import torch, torch_rope
        >>> layer = torch_rope.QKNormRotaryEmbedding(64, max_wavelength=1e6, eps=1e-5)
        >>> q, k = torch.randn(2, 5, 8, 64), torch.randn(2, 5, 2, 64)  # (B, S, H, D)
        >>> positions = torch.arange(5).unsqueeze(-1)
        >>> q2, k2 = layer(q, k, positions)
        >>> normalized = torch.nn.functional.rms_norm(q, (64,), layer.q_norm.weight, eps=1e-5)
        >>> rotated = torch_rope.apply(normalized, positions, layer.inv_freq)
        >>> torch.allclose(q2, rotated, atol=1e-5)
        True
    """

    norm_axes: list[int] | None

    _name = _NAME

    def __init__(
        self,
        rotary_dim: int,
        rope_parameters: Mapping[str, Any] | None = None,
        *,
        max_position_embeddings: int | None = None,
        max_wavelength: float = MAX_WAVELENGTH,
        inv_freq: Tensor | None = None,
        attention_factor: float | None = None,
        learned: bool = False,
        embedding_axis: int = -1,
        rotary_offset: int = 0,
        interleaved: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        head_dim: int | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        norm_axes: Sequence[int] | None = None,
        norm_last: bool = False,
        num_heads: tuple[int, int] | None = None,
        q_weight: bool = True,
        k_weight: bool = True,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            rotary_dim,
            rope_parameters,
            max_position_embeddings=max_position_embeddings,
            max_wavelength=max_wavelength,
            inv_freq=inv_freq,
            attention_factor=attention_factor,
            learned=learned,
            embedding_axis=embedding_axis,
            rotary_offset=rotary_offset,
            interleaved=interleaved,
            dtype=dtype,
            device=device,
        )
        _check_norm(eps, weight_offset, weight_dtype)
        if norm_axes is not None:
            _check_norm_axes(norm_axes, embedding_axis)
        flags = {"norm_last": norm_last, "q_weight": q_weight, "k_weight": k_weight}
        for option, flag in flags.items():
            check_bool(_NAME, option, flag)
        if num_heads is not None:
            _check_num_heads(num_heads)
            norm_axes = (-2, -1) if norm_axes is None else norm_axes
        self.head_dim = _checked_head_dim(head_dim, rotary_offset + rotary_dim)
        self.eps = float(eps)
        self.weight_offset = float(weight_offset)
        self.norm_axes = None if norm_axes is None else [int(axis) for axis in norm_axes]
        self.norm_last = norm_last

        heads = (None, None) if num_heads is None else num_heads
        device = self.inv_freq.device
        self.q_norm, self.k_norm = (
            NormWeight(
                self._weight_shape(heads[place]),
                1.0 - self.weight_offset,
                exists,
                device,
                weight_dtype,
            )
            for place, exists in enumerate((q_weight, k_weight))
        )

    def _weight_shape(self, num_heads: int | None) -> list[int]:
        """Returns the shape in which a weight broadcasts with the dimensions it is for."""
        if num_heads is None:
            return [self.head_dim]
        axes = self.norm_axes
        assert axes is not None
        if len(axes) != 2 or self.embedding_axis not in axes or max(axes) >= 0:
            rule = (
                "be two negative dimensions, that of heads and embedding_axis, together with "
                "num_heads"
            )
            raise ValueError(message(_NAME, "norm_axes", rule, tuple(axes)))
        heads = sum(axes) - self.embedding_axis
        # Weights have the dimensions of x without the embedding axis, and then that.
        distance = -heads if heads > self.embedding_axis else -heads - 1
        return [num_heads, *[1] * (distance - 1), self.head_dim]

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        layer_type: str | None = None,
        mrope_interleaved: bool | None = None,
        **options: Any,
    ) -> "QKNormRotaryEmbedding":
        """Returns the layer of a Hugging Face model.

        The frequencies are those of :meth:`RotaryEmbedding.from_config`, ``eps`` is the
        configuration's ``rms_norm_eps`` or ``norm_eps``. The rest depends on the model's code and
        is taken from ``model_type``: norms over all heads (OLMo 2, OLMoE, MiniMax-M2), after the
        rotation (HunYuan, Llama 4), without a weight (Llama 4), with a weight that is added to 1
        (Gemma 3, Qwen3-Next, Qwen3.5). Types in transformers 5.24 without such norms (Llama,
        Mistral, Qwen2, GLM-4) are rejected. All others, even unknown ones, are assumed to be like
        Qwen3, with a norm of each head before the rotation: pass options if that is wrong.

        Some models have layers that do not rotate (Llama 4, EXAONE 4): those need another layer.

        Args:
            config: The configuration, or the dictionary of its ``config.json``.
            layer_type: As for :meth:`RotaryEmbedding.from_config`.
            mrope_interleaved: As for :meth:`RotaryEmbedding.from_config`.
            options: Options of the class, which take precedence: ``norm_axes=(-3, -1)`` for a norm
                over all heads of tensors of shape ``(B, H, S, D)``, ``eps``, ``weight_dtype`` and
                others.

        Raises:
            ValueError: If the model is known to have no such norms, and as for
                :meth:`RotaryEmbedding.from_config`.
            TypeError: If ``config`` is not a configuration.

        Example:
            >>> import torch_rope
            >>> config = {"model_type": "gemma3_text", "head_dim": 256, "rms_norm_eps": 1e-6}
            >>> torch_rope.QKNormRotaryEmbedding.from_config(config)
            QKNormRotaryEmbedding(
              256, rope_type='default', rope_theta=10000.0, weight_offset=1.0
              (q_norm): NormWeight(256)
              (k_norm): NormWeight(256)
            )
        """
        name = f"{cls._name}.from_config"
        norms = read_norms(name, config, options.keys())
        head_dim = read_config(name, config, layer_type).head_dim
        known = {
            "head_dim": head_dim,
            "eps": norms.eps,
            "weight_offset": norms.weight_offset,
            "norm_last": norms.norm_last,
            "num_heads": norms.num_heads,
            "q_weight": norms.has_weight,
            "k_weight": norms.has_weight,
        }
        layer = super().from_config(
            config,
            layer_type=layer_type,
            mrope_interleaved=mrope_interleaved,
            **(known | options),
        )
        return cast(QKNormRotaryEmbedding, layer)

    def _rotate_pair(
        self, q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not is_scripting():
            return norm_apply(
                (q, k),
                (self.q_norm.viewed(), self.k_norm.viewed()),
                positions,
                inv_freq,
                embedding_axis=self.embedding_axis,
                rotary_dim=self.rotary_dim,
                rotary_offset=self.rotary_offset,
                attention_factor=self.attention_factor,
                interleaved=self.interleaved,
                eps=self.eps,
                weight_offset=self.weight_offset,
                norm_axes=self.norm_axes,
                norm_last=self.norm_last,
            )
        pair: tuple[Tensor, Tensor] = torch.ops.rope.norm_apply_qk(
            q,
            k,
            self.q_norm.viewed(),
            self.k_norm.viewed(),
            positions,
            inv_freq,
            embedding_axis=self.embedding_axis,
            rotary_dim=self.rotary_dim,
            rotary_offset=self.rotary_offset,
            attention_factor=self.attention_factor,
            interleaved=self.interleaved,
            eps=self.eps,
            weight_offset=self.weight_offset,
            norm_axes=self.norm_axes,
            norm_last=self.norm_last,
        )
        return pair

    @torch.jit.export
    def rotate(self, x: Tensor, positions: Tensor, seq_len: int | None = None) -> Tensor:
        """Normalizes and rotates queries alone, as ``forward(x, positions)`` does.

        Args:
            x: As for :func:`norm_apply`.
            positions: As for :func:`apply`.
            seq_len: As for :meth:`RotaryEmbedding.forward`.
        """
        return self._rotate_one(x, self.q_norm.viewed(), positions, seq_len)

    @torch.jit.export
    def rotate_key(self, x: Tensor, positions: Tensor, seq_len: int | None = None) -> Tensor:
        """Normalizes and rotates keys alone.

        Args:
            x: As for :func:`norm_apply`.
            positions: As for :func:`apply`.
            seq_len: As for :meth:`RotaryEmbedding.forward`.
        """
        return self._rotate_one(x, self.k_norm.viewed(), positions, seq_len)

    def _rotate_one(
        self, x: Tensor, weight: Tensor | None, positions: Tensor, seq_len: int | None
    ) -> Tensor:
        if not is_scripting() and isinstance(x, (tuple, list)):
            rule = "be a tensor (for a pair, layer(q, k, positions))"
            raise TypeError(message(self._name, "x", rule, kind_of(x)))
        return norm_apply(
            x,
            weight,
            positions,
            self._inv_freq_at(positions, seq_len),
            embedding_axis=self.embedding_axis,
            rotary_dim=self.rotary_dim,
            rotary_offset=self.rotary_offset,
            attention_factor=self.attention_factor,
            interleaved=self.interleaved,
            eps=self.eps,
            weight_offset=self.weight_offset,
            norm_axes=self.norm_axes,
            norm_last=self.norm_last,
        )

    def reset_parameters(self) -> None:
        """Makes the weights neutral and recomputes the frequencies in place.

        Raises:
            RuntimeError: If the frequencies were passed as ``inv_freq``, which is not kept.
        """
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()
        super().reset_parameters()

    def extra_repr(self) -> str:
        """Shows what RotaryEmbedding shows, and the options that differ from their defaults."""
        shown = [super().extra_repr()]
        if self.head_dim != self.rotary_offset + self.rotary_dim:
            shown.append(f"head_dim={self.head_dim}")
        if self.eps != 1e-6:
            shown.append(f"eps={self.eps}")
        if self.weight_offset != 0.0:
            shown.append(f"weight_offset={self.weight_offset}")
        if self.norm_axes is not None:
            shown.append(f"norm_axes={tuple(self.norm_axes)}")
        if self.norm_last:
            shown.append("norm_last=True")
        return ", ".join(shown)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Loads weights by any of their names."""
        for name, others in _OTHER_NAMES.items():
            for other in others:
                weight = state_dict.pop(f"{prefix}{other}.weight", None)
                if weight is not None:
                    state_dict[f"{prefix}{name}.weight"] = weight
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _check_norm(eps: Any, weight_offset: Any, weight_dtype: Any) -> None:
    """Raises for options that are invalid for every call."""
    check_number(_NAME, "eps", eps)
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(message(_NAME, "eps", "be at least 0 and finite", eps))
    check_number(_NAME, "weight_offset", weight_offset)
    if not math.isfinite(weight_offset):
        raise ValueError(message(_NAME, "weight_offset", "be finite", weight_offset))
    if weight_dtype is not None and weight_dtype not in _WEIGHT_DTYPES:
        rule = "be float64, float32, float16 or bfloat16"
        is_dtype = isinstance(weight_dtype, torch.dtype)
        got = str(weight_dtype).removeprefix("torch.") if is_dtype else kind_of(weight_dtype)
        raise TypeError(message(_NAME, "weight_dtype", rule, got))


def _check_norm_axes(norm_axes: Any, embedding_axis: int) -> None:
    """Raises for dimensions that are invalid for every call."""
    check_integers(_NAME, "norm_axes", norm_axes)
    if len(norm_axes) == 0 or len(set(norm_axes)) != len(norm_axes):
        rule = "be distinct dimensions"
        raise ValueError(message(_NAME, "norm_axes", rule, tuple(norm_axes)))
    # A dimension that counts from the other end may be the embedding axis.
    is_known = all((axis < 0) == (embedding_axis < 0) for axis in norm_axes)
    if is_known and embedding_axis not in norm_axes:
        rule = f"contain embedding_axis, {embedding_axis}"
        raise ValueError(message(_NAME, "norm_axes", rule, tuple(norm_axes)))


def _check_num_heads(num_heads: Any) -> None:
    check_integers(_NAME, "num_heads", num_heads)
    if len(num_heads) != 2 or min(num_heads) < 1:
        rule = "be the numbers of query heads and of key heads, at least 1"
        raise ValueError(message(_NAME, "num_heads", rule, tuple(num_heads)))


def _checked_head_dim(head_dim: Any, rotated: int) -> int:
    """Returns the size of the embedding axis, by default the end of the rotated slice."""
    if head_dim is None:
        return rotated
    check_integer(_NAME, "head_dim", head_dim)
    if head_dim < rotated:
        rule = f"be at least rotary_offset + rotary_dim = {rotated}"
        raise ValueError(message(_NAME, "head_dim", rule, head_dim))
    return int(head_dim)
