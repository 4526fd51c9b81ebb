"""The layers: nn.Modules around the operators."""

import math
import reprlib
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, overload

import torch
import torch.fx
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from torch_rope._arguments import (
    check_bool,
    check_dtype,
    check_integer,
    check_number,
    check_tensor,
    kind_of,
    message,
)
from torch_rope._config import read_config
from torch_rope._frequencies import (
    Frequencies,
    check_rope_parameters,
    default_device,
    frequencies,
    mrope_frequencies,
)
from torch_rope._operators import apply
from torch_rope._side_inputs import side_input

_APPLY_ROPE = "torch_rope.ApplyRoPE"
_ROTARY = "torch_rope.RotaryEmbedding"

MAX_WAVELENGTH = 10000.0

# The types whose frequencies depend on the sequence length.
_FOLLOWING_LENGTH = ("dynamic", "longrope")


class ApplyRoPE(nn.Module):
    """Rotates its input by positions, which may be a side input.

    The enclosing :class:`WithSideInputsFromInputTuple` hands a side input directly to the layer;
    the layers in between do not see it.

    If dimensions are named, by ``names`` and ``positions_names``, positions are aligned with the
    input by name, in any order.

    Args:
        embedding_axis: The dimension to rotate: its index or its name.
        max_wavelength: The base of the frequencies, positive.
        scale_factor: Divides the angle, positive.
        rotary_dim: The number of rotated elements, even; by default the whole axis.
        interleaved: Whether pairs are adjacent elements instead of the two halves.
        positions_tag: The tag of the side input to use as positions in calls without any; any
            hashable but None.
        names: The names of the input's dimensions, required if ``embedding_axis`` is a name.
        positions_names: The names of the dimensions of the positions, likewise.

    Raises:
        ValueError: If names are given with an integer ``embedding_axis``, or a name is repeated.
        TypeError: If an option has the wrong type.

    Example:
        >>> import torch, torch_rope
        >>> x, positions = torch.randn(2, 5, 8, 64), torch.arange(10).view(2, 5)
        >>> y = torch_rope.ApplyRoPE(embedding_axis=-1)(x, positions.unsqueeze(-1))
        >>> layer = torch_rope.ApplyRoPE(
        ...     embedding_axis="head_dim",
        ...     names=("batch", "sequence", "heads", "head_dim"),
        ...     positions_names=("batch", "sequence"),
        ... )
        >>> torch.equal(layer(x, positions), y)
        True
    """

    def __init__(
        self,
        embedding_axis: int | str,
        max_wavelength: float = MAX_WAVELENGTH,
        *,
        scale_factor: float = 1.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        positions_tag: Hashable = None,
        names: Sequence[str] | None = None,
        positions_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(embedding_axis, str):
            check_integer(_APPLY_ROPE, "embedding_axis", embedding_axis)
            for option, given in (("names", names), ("positions_names", positions_names)):
                if given is not None:
                    rule = "be omitted for an integer embedding_axis"
                    raise ValueError(message(_APPLY_ROPE, option, rule, repr(given)))
        check_number(_APPLY_ROPE, "max_wavelength", max_wavelength)
        check_number(_APPLY_ROPE, "scale_factor", scale_factor)
        if rotary_dim is not None:
            check_integer(_APPLY_ROPE, "rotary_dim", rotary_dim)
        check_bool(_APPLY_ROPE, "interleaved", interleaved)
        if not isinstance(positions_tag, Hashable):
            raise TypeError(
                message(_APPLY_ROPE, "positions_tag", "be hashable", kind_of(positions_tag))
            )
        _check_strings("names", names)
        _check_strings("positions_names", positions_names)
        self.embedding_axis = embedding_axis
        self.max_wavelength = max_wavelength
        self.scale_factor = scale_factor
        self.rotary_dim = rotary_dim
        self.interleaved = interleaved
        self.positions_tag = positions_tag
        self.names = None if names is None else tuple(names)
        self.positions_names = None if positions_names is None else tuple(positions_names)

    @classmethod
    def from_config(
        cls,
        positions_tag: Hashable,
        embedding_axis: int | str,
        max_wavelength: float = MAX_WAVELENGTH,
        **options: Any,
    ) -> "ApplyRoPE":
        """Returns a layer whose positions are the side input with a given tag.

        Args:
            positions_tag: The tag, one of those of the enclosing
                :class:`WithSideInputsFromInputTuple`.
            embedding_axis: The dimension to rotate: its index or its name.
            max_wavelength: The base of the frequencies, positive.
            options: Other options of the class.

        Example:
            >>> import torch_rope
            >>> torch_rope.ApplyRoPE.from_config("tokens", embedding_axis=-1)
            ApplyRoPE(embedding_axis=-1, max_wavelength=10000.0, positions_tag='tokens')
        """
        if positions_tag is None:
            rule = "be a tag"
            raise TypeError(message(f"{_APPLY_ROPE}.from_config", "positions_tag", rule, "None"))
        return cls(embedding_axis, max_wavelength, positions_tag=positions_tag, **options)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns ``x`` rotated.

        Args:
            x: As for :func:`apply`.
            positions: As for :func:`apply` or, with names, a tensor whose dimensions are some of
                those of ``x``, in any order; by default the side input.

        Returns:
            A tensor of the shape and dtype of ``x``.

        Raises:
            ValueError: If there are no positions; if the names of the positions include the
                embedding axis, or one that ``x`` does not have; and as for :func:`apply`.
            TypeError: As for :func:`apply`.
            IndexError: As for :func:`apply`.
        """
        if positions is None:
            if self.positions_tag is None:
                raise ValueError(
                    "torch_rope.ApplyRoPE(): expected positions to be given to a layer without "
                    "positions_tag, but got None"
                )
            positions = side_input(self.positions_tag)
        if isinstance(self.embedding_axis, int):
            return self._rotate(x, positions, self.embedding_axis)

        names = _given("names", self.names)
        positions_names = _given("positions_names", self.positions_names)
        x = _check_dims(x, names, "x")
        positions = _check_dims(positions, positions_names, "positions")
        _check_names(names, positions_names, self.embedding_axis)
        axis = names.index(self.embedding_axis)
        others = names[:axis] + names[axis + 1 :]
        aligned = positions.permute(
            [positions_names.index(name) for name in others if name in positions_names]
        )
        for dim, name in enumerate(others):
            if name not in positions_names:
                aligned = aligned.unsqueeze(dim)
        return self._rotate(x, aligned, axis)

    def _rotate(self, x: Tensor, positions: Tensor, embedding_axis: int) -> Tensor:
        return apply(
            x,
            positions,
            embedding_axis=embedding_axis,
            rotary_dim=self.rotary_dim,
            max_wavelength=self.max_wavelength,
            scale_factor=self.scale_factor,
            interleaved=self.interleaved,
        )

    def extra_repr(self) -> str:
        """Shows the axis, the wavelength, and the options that differ from their defaults."""
        shown = [
            f"embedding_axis={self.embedding_axis!r}",
            f"max_wavelength={float(self.max_wavelength)}",
        ]
        if self.scale_factor != 1.0:
            shown.append(f"scale_factor={self.scale_factor}")
        for name in ("rotary_dim", "positions_tag", "names", "positions_names"):
            if getattr(self, name) is not None:
                shown.append(f"{name}={getattr(self, name)!r}")
        if self.interleaved:
            shown.append("interleaved=True")
        return ", ".join(shown)


def _check_strings(option: str, names: Any) -> None:
    """Raises unless ``names`` is None or a sequence of distinct strings."""
    if names is None:
        return
    rule = "be a sequence of strings"
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(message(_APPLY_ROPE, option, rule, kind_of(names)))
    for name in names:
        if not isinstance(name, str):
            raise TypeError(message(_APPLY_ROPE, option, rule, f"one with {kind_of(name)}"))
        if names.count(name) > 1:
            raise ValueError(message(_APPLY_ROPE, option, "be distinct", f"{name!r} twice"))


def _given(option: str, names: tuple[str, ...] | None) -> tuple[str, ...]:
    if names is None:
        rule = "be given for a named embedding_axis"
        raise ValueError(message(_APPLY_ROPE, option, rule, "None"))
    return names


@torch.fx.wrap  # torch.fx cannot trace tensor.dim().
def _check_dims(tensor: Tensor, names: tuple[str, ...], argument: str) -> Tensor:
    check_tensor(_APPLY_ROPE, argument, tensor)
    if len(names) != tensor.dim():
        rule = f"have a dimension for each of {names}"
        raise ValueError(message(_APPLY_ROPE, argument, rule, f"shape {tuple(tensor.shape)}"))
    return tensor


def _check_names(
    names: tuple[str, ...], positions_names: tuple[str, ...], embedding_axis: str
) -> None:
    expected = "torch_rope.ApplyRoPE(): expected"
    if embedding_axis not in names:
        raise ValueError(
            f"{expected} embedding_axis to be among the names of x, {names}, but got "
            f"{embedding_axis!r}"
        )
    if embedding_axis in positions_names:
        raise ValueError(
            f"{expected} embedding_axis not to be among the names of positions, {positions_names}, "
            f"but got {embedding_axis!r}"
        )
    for name in positions_names:
        if name not in names:
            raise ValueError(
                f"{expected} every name of positions to be among those of x, {names}, but got "
                f"{name!r}"
            )


class RotaryEmbedding(nn.Module):
    """Holds frequencies and rotates queries and keys by them.

    The frequencies, ``inv_freq``, are a non-persistent buffer or a parameter. They keep their dtype
    through ``module.to(dtype)``, ``half()`` and the like, since bfloat16 frequencies give wrong
    angles for distant tokens. FSDP2's mixed precision casts every parameter of a group: if the
    frequencies are a parameter, call ``fully_shard`` on this module separately, without mixed
    precision.

    By default the frequencies are float32, and so are the angles, position times frequency: models
    are trained with these. At position 4095 with a base of 5e5 they differ by up to 2e-4 from those
    of :func:`apply` without ``inv_freq``, which are computed in float64; ``dtype=torch.float64``
    does the same here.

    A module that leaves the meta device (``to_empty``) recomputes the frequencies of its scheme.
    Frequencies passed as ``inv_freq`` cannot be recomputed: calls raise an error until they are
    set. ``load_state_dict`` skips ``inv_freq`` in older checkpoints unless the frequencies are
    learned.

    For ``dynamic`` and ``longrope`` the frequencies depend on the ``seq_len`` of each call, by
    default the greatest position plus one, computed on the device without synchronisation. The
    module keeps no state between calls.

    The module can be compiled by ``torch.jit.script``. In TorchScript ``forward`` takes ``q`` and
    ``k``, and the method ``rotate`` takes one tensor. Converting the dtype of a scripted module
    also converts its frequencies, and the operators then reject them. TorchScript has no
    non-persistent buffers: the state dict of a scripted module contains the frequencies, and to
    load one without them takes ``strict=False``.

    Args:
        rotary_dim: The number of rotated elements, even.
        rope_parameters: The scheme of the frequencies along one axis, as for :func:`frequencies`.
            (:meth:`from_config` applies an ``mrope_section``.)
        max_position_embeddings: As for :func:`frequencies`.
        max_wavelength: The base of the frequencies, if ``rope_parameters`` has no ``rope_theta``.
        inv_freq: Frequencies to use instead of a scheme, as for :func:`apply`: ``(N,)``, or
            ``(A, N)`` for positions along ``A`` axes.
        attention_factor: Multiplies the rotated elements; by default the scheme's.
        learned: Whether the frequencies are a parameter. Not for ``dynamic`` and ``longrope``.
        embedding_axis: The dimension to rotate.
        rotary_offset: The first rotated element.
        interleaved: Whether pairs are adjacent elements instead of the two halves.
        dtype: The dtype of a scheme's frequencies, float32 or float64; ``to`` and the like do not
            change it. ``inv_freq`` keeps its own.
        device: The device of the frequencies; by default PyTorch's default device, or that of
            ``inv_freq``.

    Raises:
        ValueError: If options are invalid or contradict each other, and as for :func:`frequencies`.
        TypeError: If an option has the wrong type, and as for :func:`frequencies`.

    Example:
        >>> import torch, torch_rope
        >>> rotary = torch_rope.RotaryEmbedding(64, {"rope_type": "linear", "factor": 2.0})
        >>> q, k = torch.randn(2, 5, 8, 64), torch.randn(2, 5, 2, 64)
        >>> positions = torch.arange(5).unsqueeze(-1)
        >>> q_rotated, k_rotated = rotary(q, k, positions)
        >>> torch.equal(q_rotated, rotary(q, positions))
        True
    """

    inv_freq: Tensor
    long_inv_freq: Tensor | None

    # The class that messages name.
    _name = _ROTARY

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
    ) -> None:
        super().__init__()
        name = self._name
        _check_rotary_options(
            name, rotary_dim, max_wavelength, attention_factor, embedding_axis, rotary_offset
        )
        check_bool(name, "interleaved", interleaved)
        check_bool(name, "learned", learned)
        check_dtype(name, dtype)
        if device is not None:
            device = default_device(device, name)
        if rope_parameters is not None:
            hint = " (for the base, use max_wavelength=)"
            check_rope_parameters(name, rope_parameters, hint)
        if inv_freq is not None:
            _check_inv_freq(name, inv_freq, rotary_dim, dtype)
        self.rotary_dim = rotary_dim
        self.embedding_axis = embedding_axis
        self.rotary_offset = rotary_offset
        self.interleaved = interleaved
        self.learned = learned
        self.rope_parameters = _with_theta(name, rope_parameters, max_wavelength, inv_freq)
        if max_position_embeddings is None:
            max_position_embeddings = self.rope_parameters.get("max_position_embeddings")
        self.max_position_embeddings = max_position_embeddings
        self.rope_type = None if inv_freq is not None else _type_of(self.rope_parameters)
        if learned and self.rope_type in _FOLLOWING_LENGTH:
            raise ValueError(
                f"{name}(): expected learned to be False for a rope_type whose frequencies depend "
                f"on the sequence length, but got True for {self.rope_type}"
            )

        # M-RoPE: the number of pairs per axis, and whether the axes alternate.
        self._sections: tuple[int, ...] | None = None
        self._sections_alternate = False
        if inv_freq is None:
            computed = self._compute(None, dtype, device)
        else:
            copy = inv_freq.detach().clone()
            computed = Frequencies(copy if device is None else copy.to(device), 1.0)
        self.attention_factor = computed.attention_factor
        if attention_factor is not None:
            self.attention_factor = float(attention_factor)
        if learned:
            self.inv_freq = nn.Parameter(computed.inv_freq)
        else:
            self.register_buffer("inv_freq", computed.inv_freq, persistent=False)

        # The length beyond which the frequencies change: 0 if they never do, -1 if they are not set
        # yet. The rest gives the frequencies beyond it.
        self._trained_length, self._rope_theta, self._factor = 0, 0.0, 0.0
        self.register_buffer("long_inv_freq", None, persistent=False)
        if self.rope_type == "longrope":
            self._trained_length = self.rope_parameters["original_max_position_embeddings"]
            self.long_inv_freq = self._compute(self._trained_length + 1, dtype, device).inv_freq
        elif self.rope_type == "dynamic":
            assert max_position_embeddings is not None  # Checked by frequencies().
            self._trained_length = max_position_embeddings
            self._rope_theta = float(self.rope_parameters["rope_theta"])
            self._factor = float(self.rope_parameters["factor"])
        # The frequency tensor that still has to be set, and its version. In a tuple, so that
        # nn.Module does not register a parameter.
        self._unset: tuple[Tensor, ...] = ()
        self._unset_version = 0

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        layer_type: str | None = None,
        mrope_interleaved: bool | None = None,
        **options: Any,
    ) -> "RotaryEmbedding":
        """Returns the layer of a Hugging Face model.

        The pair convention depends on the model's code. ``interleaved`` is the configuration's
        ``rope_interleave`` (DeepSeek-V3 and similar); otherwise it is whether transformers' code
        for the ``model_type`` pairs neighbours (GPT-J, Cohere, GLM-4, Llama 4, ERNIE 4.5 and
        others). Model types that transformers does not have, such as those with code on the Hub,
        are assumed to use halves: pass ``interleaved=`` if that is wrong.

        Keys of the rope parameters that do not affect the angles (``llama_4_scaling_beta``,
        ``finetuned``) are ignored; unknown keys are rejected.

        Prefer an object to a dictionary: some models name their sizes differently in the file.

        Args:
            config: The configuration, or the dictionary of its ``config.json``:
                ``rope_parameters``, or the older ``rope_scaling`` and ``rope_theta`` (default
                10000); ``head_dim``, or ``hidden_size`` and ``num_attention_heads``;
                ``partial_rotary_factor``; ``max_position_embeddings``. For a multimodal model the
                ``text_config`` is used.
            layer_type: The layer type, such as ``sliding_attention``, for models whose
                ``rope_parameters`` differ between types.
            mrope_interleaved: For a configuration with an ``mrope_section``, whether the axes
                alternate (see :func:`mrope_frequencies`); by default the configuration's value.
            options: ``interleaved``, ``dtype`` and other options of the class.

        Raises:
            ValueError: If the configuration lacks a required key or has an unknown one, or
                ``layer_type`` is missing or unknown.
            TypeError: If ``config`` is not a configuration.

        Example:
            >>> import torch_rope
            >>> config = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0}
            >>> torch_rope.RotaryEmbedding.from_config(config)
            RotaryEmbedding(128, rope_type='default', rope_theta=500000.0)
        """
        name = f"{cls._name}.from_config"
        if layer_type is not None and not isinstance(layer_type, str):
            raise TypeError(message(name, "layer_type", "be a string", kind_of(layer_type)))
        if mrope_interleaved is not None:
            check_bool(name, "mrope_interleaved", mrope_interleaved)
        read = read_config(name, config, layer_type)
        parameters, sections = read.rope_parameters, read.mrope_section
        if sections is not None:
            if mrope_interleaved is None:
                mrope_interleaved = parameters.get("mrope_interleaved")
            if mrope_interleaved is None:
                rule = (
                    "be given for a config with mrope_section that does not set it (False for "
                    "Qwen2-VL, True for Qwen3-VL)"
                )
                raise ValueError(message(name, "mrope_interleaved", rule, "None"))
            if parameters["rope_type"] in _FOLLOWING_LENGTH:
                raise ValueError(
                    f"{name}(): expected rope_type not to be one of {_FOLLOWING_LENGTH} together "
                    f"with mrope_section, but got {parameters['rope_type']!r}"
                )
        options.setdefault("interleaved", read.interleaved)
        rotary = cls(
            read.rotary_dim,
            parameters,
            max_position_embeddings=read.max_position_embeddings,
            **options,
        )
        if sections is not None:
            rotary._apply_sections(sections, cast(bool, mrope_interleaved))
        return rotary

    def _apply_sections(self, sections: Sequence[int], alternate: bool) -> None:
        rows = mrope_frequencies(self.inv_freq.detach(), sections, interleaved=alternate)
        self.inv_freq = nn.Parameter(rows) if self.learned else rows
        self._sections, self._sections_alternate = tuple(sections), alternate

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, q: Tensor, k: Tensor, positions: Tensor, seq_len: int | None = None
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            q: tuple[Tensor, Tensor] | list[Tensor],
            k: Tensor,
            positions: None = None,
            seq_len: int | None = None,
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            q: tuple[Tensor, Tensor] | list[Tensor],
            k: None = None,
            *,
            positions: Tensor,
            seq_len: int | None = None,
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self, q: Tensor, k: Tensor, positions: None = None, seq_len: int | None = None
        ) -> Tensor: ...

        @overload
        def __call__(
            self, q: Tensor, k: None = None, *, positions: Tensor, seq_len: int | None = None
        ) -> Tensor: ...

        @overload
        def __call__(
            self, q: Tensor, k: None, positions: Tensor, seq_len: int | None = None
        ) -> Tensor: ...

        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        positions: Tensor | None = None,
        seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the rotated queries and keys; ``forward(x, positions)`` returns one tensor.

        Outside TorchScript ``forward((q, k), positions)`` is the same as
        ``forward(q, k, positions)``.

        Args:
            q: Like ``x`` of :func:`apply`.
            k: Like ``q``; rotated by the same angles.
            positions: As for :func:`apply`.
            seq_len: The sequence length to choose frequencies for (``dynamic`` and ``longrope``).

        Returns:
            Tensors of the shapes and dtypes of ``q`` and ``k``.

        Raises:
            ValueError: As for :func:`apply`; or if the frequencies were passed as ``inv_freq``,
                came from the meta device and have not been set.
            TypeError: As for :func:`apply`.
            IndexError: As for :func:`apply`.
        """
        if not is_scripting() and (positions is None or k is None):
            given = k if positions is None else positions
            if positions is None and _looks_like_k(k, q) and self.inv_freq.dim() == 1:
                rule = "be a tensor (layer(q, k, positions))"
                raise TypeError(message(self._name, "positions", rule, "None"))
            is_plain = isinstance(q, Tensor) and given is not None
            rotate: Any = self.rotate if is_plain else self._rotate_first
            rotated: Any = rotate(q, given, seq_len)
            return cast(tuple[Tensor, Tensor], rotated)
        assert k is not None, "In TorchScript forward takes q, k and positions"
        assert positions is not None, "In TorchScript forward takes q, k and positions"
        return self._rotate_pair(q, k, positions, self._inv_freq_at(positions, seq_len))

    def _rotate_pair(
        self, q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not is_scripting():
            return apply(
                (q, k),
                positions,
                inv_freq,
                embedding_axis=self.embedding_axis,
                rotary_dim=self.rotary_dim,
                rotary_offset=self.rotary_offset,
                attention_factor=self.attention_factor,
                interleaved=self.interleaved,
            )
        pair: tuple[Tensor, Tensor] = torch.ops.rope.apply_qk(
            q,
            k,
            positions,
            inv_freq,
            embedding_axis=self.embedding_axis,
            rotary_dim=self.rotary_dim,
            rotary_offset=self.rotary_offset,
            attention_factor=self.attention_factor,
            interleaved=self.interleaved,
        )
        return pair

    @torch.jit.export
    def rotate(self, x: Tensor, positions: Tensor, seq_len: int | None = None) -> Tensor:
        """Rotates one tensor, as ``forward(x, positions)`` does; for TorchScript.

        Args:
            x: As for :func:`apply`.
            positions: As for :func:`apply`.
            seq_len: As for :meth:`forward`.
        """
        return apply(
            x,
            positions,
            self._inv_freq_at(positions, seq_len),
            embedding_axis=self.embedding_axis,
            rotary_dim=self.rotary_dim,
            rotary_offset=self.rotary_offset,
            attention_factor=self.attention_factor,
            interleaved=self.interleaved,
        )

    def _rotate_first(self, q: Any, positions: Any, seq_len: int | None) -> Any:
        """Rotates the first argument of ``forward``, a tensor or a pair."""
        if positions is None:
            raise TypeError(message(self._name, "positions", "be a tensor", "None"))
        if not isinstance(q, (tuple, list)):
            return self.rotate(q, positions, seq_len)
        if len(q) != 2:
            got = f"a {kind_of(q)} of {len(q)}"
            raise TypeError(message(self._name, "q", "be a tensor or a (q, k) tuple", got))
        return self.forward(q[0], q[1], positions, seq_len)

    def _inv_freq_at(self, positions: Tensor, seq_len: int | None) -> Tensor:
        """Returns the frequencies for seq_len, by default the greatest position plus one."""
        if self._trained_length == 0:
            return self.inv_freq
        if self._trained_length < 0:
            self._refuse_unset()
            return self.inv_freq
        return _follow_length(
            self.inv_freq,
            self.long_inv_freq,
            positions,
            seq_len,
            self._trained_length,
            self.rotary_dim,
            self._rope_theta,
            self._factor,
        )

    def reset_parameters(self) -> None:
        """Recomputes the frequencies in place; for modules built on the meta device.

        Raises:
            RuntimeError: If the frequencies were passed as ``inv_freq``, which is not kept.
        """
        if self.rope_type is None:
            raise RuntimeError(
                f"{self._name}.reset_parameters(): expected the frequencies to come from a scheme, "
                "but they were given as inv_freq: copy them to module.inv_freq"
            )
        self._reset_frequencies()

    def _reset_frequencies(self) -> None:
        dtype = self.inv_freq.dtype
        with torch.no_grad():
            _fill(self.inv_freq, self._compute(None, dtype, "cpu").inv_freq)
            if self.long_inv_freq is not None:
                beyond = self._compute(self._trained_length + 1, dtype, "cpu")
                _fill(self.long_inv_freq, beyond.inv_freq)

    def extra_repr(self) -> str:
        """Shows the scheme with its numbers, and the options that differ from their defaults."""
        shown = [str(self.rotary_dim)]
        if self.rope_type is None:
            shown.append(f"inv_freq of shape {tuple(self.inv_freq.shape)}")
        else:
            numbers = {"rope_type": self.rope_type, "rope_theta": None, **self.rope_parameters}
            numbers.pop("type", None)
            if self.rope_type in _FOLLOWING_LENGTH:
                numbers["max_position_embeddings"] = self.max_position_embeddings
            numbers["rope_type"] = self.rope_type
            for key in ("mrope_section", "mrope_interleaved"):  # Only from_config applies these.
                numbers.pop(key, None)
            if self._sections is not None:
                numbers["mrope_section"] = self._sections
                numbers["mrope_interleaved"] = self._sections_alternate
            shown += [f"{k}={reprlib.repr(v)}" for k, v in numbers.items() if v is not None]
        if self.attention_factor != 1.0 and "attention_factor" not in self.rope_parameters:
            shown.append(f"attention_factor={self.attention_factor}")
        if self.embedding_axis != -1:
            shown.append(f"embedding_axis={self.embedding_axis}")
        if self.rotary_offset != 0:
            shown.append(f"rotary_offset={self.rotary_offset}")
        for name in ("interleaved", "learned"):
            if getattr(self, name):
                shown.append(f"{name}=True")
        if self.inv_freq.dtype != torch.float32:
            shown.append(f"dtype={self.inv_freq.dtype}")
        return ", ".join(shown)

    def _compute(
        self, seq_len: int | None, dtype: torch.dtype, device: torch.device | str | None
    ) -> Frequencies:
        computed = frequencies(
            self.rope_parameters,
            self.rotary_dim,
            max_position_embeddings=self.max_position_embeddings,
            seq_len=seq_len,
            dtype=dtype,
            device=device,
        )
        if self._sections is None:
            return computed
        rows = mrope_frequencies(
            computed.inv_freq, self._sections, interleaved=self._sections_alternate
        )
        return Frequencies(rows, computed.attention_factor)

    # ---- From the meta device and from checkpoints ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Moves the frequencies to the device fn moves to; keeps their dtype and values."""
        is_pending = self.inv_freq.is_meta or self._is_unset()
        buffers = [buffer for buffer in self._buffers.values() if buffer is not None]

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            # to_empty() drops the values, and no state dict restores a non-persistent buffer.
            is_buffer = type(moved) is Tensor and any(tensor is buffer for buffer in buffers)
            if is_buffer and moved is not tensor and not (tensor.is_meta or moved.is_meta):
                moved.copy_(tensor)
            return moved

        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(keep, recurse=False)  # type: ignore[no-untyped-call]
        if is_pending and not self.inv_freq.is_meta:
            if self.rope_type is None:
                with torch.no_grad():  # Tracers do not see the mark: NaN beats garbage.
                    self.inv_freq.fill_(math.nan)
                self._mark_unset()
            else:
                self._reset_frequencies()
        return self

    def _mark_unset(self) -> None:
        """Makes calls raise an error until the frequencies are set."""
        self._unset, self._unset_version = (self.inv_freq,), self.inv_freq._version
        self._trained_length = -1

    def _is_unset(self) -> bool:
        """Returns whether the frequencies still have to be set; never reads them."""
        if self._unset and not self._is_as_it_was():
            self._unset, self._trained_length = (), 0
        return bool(self._unset)

    def _is_as_it_was(self) -> bool:
        inv_freq = self.inv_freq
        return self._unset[0] is inv_freq and inv_freq._version == self._unset_version

    # The effect of torch.compiler.assume_constant_result without importing the compiler.
    _is_as_it_was._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @torch.jit.unused
    def _refuse_unset(self) -> None:
        if torch.compiler.is_compiling():
            is_unset = self._is_as_it_was()
        else:
            # If the compiler is loaded, keep it from compiling (and recompiling) this function.
            compiler = sys.modules.get("torch._dynamo")
            ask = self._is_unset if compiler is None else compiler.disable(self._is_unset)
            is_unset = ask()
        if is_unset:
            rule = "be set after it leaves the meta device (module.inv_freq.copy_)"
            raise ValueError(message(self._name, "inv_freq", rule, "uninitialised memory"))

    def __prepare_scriptable__(self) -> "RotaryEmbedding":
        self._is_unset()
        return self

    def __getstate__(self) -> Any:
        self._is_unset()
        return super().__getstate__()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._unset:
            self._mark_unset()  # A copy has its own version counter.

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *arguments: Any,
    ) -> None:
        """Loads frequencies that are learned or still have to be set; skips others."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        if not self.learned:
            saved = state_dict.pop(f"{prefix}inv_freq", None)
            is_pending = self.inv_freq.is_meta or self._is_unset()
            if saved is not None and self.rope_type is None and is_pending:
                self._load_own(saved, assign)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        if assign and not self.learned and self.rope_type is not None and self.inv_freq.is_meta:
            # Nothing else will materialise them: a state dict does not contain them.
            dtype = self.inv_freq.dtype
            self.inv_freq = self._compute(None, dtype, None).inv_freq
            if self.long_inv_freq is not None:
                beyond = self._compute(self._trained_length + 1, dtype, None)
                self.long_inv_freq = beyond.inv_freq

    def _load_own(self, saved: Tensor, assign: bool) -> None:
        if saved.shape != self.inv_freq.shape:
            rule = f"have shape {tuple(self.inv_freq.shape)} in the state dict"
            raise ValueError(message(self._name, "inv_freq", rule, tuple(saved.shape)))
        if assign:
            self.inv_freq = saved.detach().to(self.inv_freq.dtype)
        else:
            self.inv_freq.copy_(saved.detach())


def _looks_like_k(positions: Any, q: Any) -> bool:
    """Returns whether positions have as many dimensions as q, which those along one axis cannot."""
    return (
        isinstance(positions, Tensor)
        and isinstance(q, Tensor)
        and positions.is_floating_point()
        and positions.dim() == q.dim() >= 2
        and positions.shape[-1] == q.shape[-1]
    )


@torch.fx.wrap  # torch.fx cannot trace branches on seq_len or the number of positions.
def _follow_length(
    inv_freq: Tensor,
    long_inv_freq: Tensor | None,
    positions: Tensor,
    seq_len: int | None,
    trained_length: int,
    rotary_dim: int,
    rope_theta: float,
    factor: float,
) -> Tensor:
    """Returns the frequencies of longrope (with ``long_inv_freq``) or dynamic for a length."""
    if not is_scripting():
        check_tensor(_ROTARY, "positions", positions)
    if positions.numel() == 0:
        return inv_freq
    if seq_len is not None and seq_len <= trained_length:
        return inv_freq
    if seq_len is not None and long_inv_freq is not None:
        return long_inv_freq
    if seq_len is None:
        length = positions.max() + 1
    else:
        length = torch.full((), seq_len, dtype=torch.int64, device=positions.device)
    if long_inv_freq is not None:
        return torch.where(length > trained_length, long_inv_freq, inv_freq)
    followed: Tensor = torch.ops.rope._dynamic_frequencies(
        length, rotary_dim, rope_theta, factor, trained_length, inv_freq.dtype
    )
    return followed


def _fill(tensor: Any, values: Tensor) -> None:
    """Copies values into a tensor or DTensor, without communication."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(
            values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    tensor.copy_(values)


def _check_rotary_options(
    name: str,
    rotary_dim: Any,
    max_wavelength: Any,
    attention_factor: Any,
    embedding_axis: Any,
    rotary_offset: Any,
) -> None:
    """Raises for numbers that are invalid for every call."""
    check_integer(name, "rotary_dim", rotary_dim)
    if rotary_dim <= 0 or rotary_dim % 2:
        rule = "be positive and a multiple of 2"
        raise ValueError(message(name, "rotary_dim", rule, rotary_dim))
    check_number(name, "max_wavelength", max_wavelength)
    if not (max_wavelength > 0 and math.isfinite(max_wavelength)):
        rule = "be positive and finite"
        raise ValueError(message(name, "max_wavelength", rule, max_wavelength))
    if attention_factor is not None:
        check_number(name, "attention_factor", attention_factor)
        if not math.isfinite(attention_factor):
            raise ValueError(message(name, "attention_factor", "be finite", attention_factor))
    check_integer(name, "embedding_axis", embedding_axis)
    check_integer(name, "rotary_offset", rotary_offset)
    if rotary_offset < 0:
        raise ValueError(message(name, "rotary_offset", "be at least 0", rotary_offset))


def _check_inv_freq(name: str, inv_freq: Any, rotary_dim: int, dtype: torch.dtype) -> None:
    """Raises for frequencies that every call would reject."""
    if not isinstance(inv_freq, Tensor):
        raise TypeError(message(name, "inv_freq", "be a tensor", kind_of(inv_freq)))
    if inv_freq.dtype not in (torch.float32, torch.float64):
        got = str(inv_freq.dtype).removeprefix("torch.")
        raise TypeError(message(name, "inv_freq", "be float32 or float64", got))
    if inv_freq.dim() not in (1, 2):
        rule = "have shape (N) or (A, N)"
        raise ValueError(message(name, "inv_freq", rule, tuple(inv_freq.shape)))
    if inv_freq.shape[-1] != rotary_dim // 2:
        rule = f"have rotary_dim / 2 = {rotary_dim // 2} columns"
        raise ValueError(message(name, "inv_freq", rule, inv_freq.shape[-1]))
    if dtype not in (torch.float32, inv_freq.dtype):
        rule = "be left at its default together with inv_freq"
        raise ValueError(message(name, "dtype", rule, dtype))


def _with_theta(
    name: str,
    rope_parameters: Mapping[str, Any] | None,
    max_wavelength: float,
    inv_freq: Tensor | None,
) -> dict[str, Any]:
    """Returns a copy of the scheme with its rope_theta; empty if inv_freq is given."""
    expected = f"{name}(): expected"
    parameters = dict(rope_parameters or {})
    if inv_freq is not None and rope_parameters is not None:
        raise ValueError(f"{expected} rope_parameters or inv_freq, but got both")
    fixed = parameters.get("rope_theta") is not None or inv_freq is not None
    if fixed and max_wavelength != MAX_WAVELENGTH:
        other = "rope_theta" if inv_freq is None else "inv_freq"
        raise ValueError(
            f"{expected} max_wavelength to be left at its default together with {other}, but got "
            f"{max_wavelength}"
        )
    if not fixed:
        parameters["rope_theta"] = max_wavelength
    return parameters


def _type_of(rope_parameters: Mapping[str, Any]) -> str:
    return rope_parameters.get("rope_type") or rope_parameters.get("type") or "default"
