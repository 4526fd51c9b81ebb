"""The layers. None rotates by itself: the operators do."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from torch_rope._config import read_config
from torch_rope._frequencies import Frequencies, frequencies, mrope_frequencies
from torch_rope._operators import apply
from torch_rope._side_inputs import side_input

_MAX_WAVELENGTH = 10000.0

# The types whose frequencies follow the length of the sequence.
_FOLLOWING_LENGTH = ("dynamic", "longrope")


class ApplyRoPE(nn.Module):
    """Rotates its input by positions, which may be a side input.

    A side input reaches the layer from the :class:`WithSideInputsFromInputTuple` around it, and not
    through the layers between.

    With names for dimensions, positions are aligned with the input by name, in any order. The names
    are those of the options ``names`` and ``positions_names``, or of the tensors (PyTorch had named
    tensors up to 2.12).

    Args:
        embedding_axis: The dimension that is rotated: its number, or its name.
        max_wavelength: The base of the frequencies, positive.
        scale_factor: Divides the angle, positive.
        rotary_dim: How many elements are rotated, even; by default all of the axis.
        interleaved: Whether pairs are adjacent elements instead of the two halves.
        positions_tag: The tag of the side input that the positions are, where a call has none; any
            hashable but None.
        names: The names of the dimensions of the input, for an ``embedding_axis`` that is a name.
        positions_names: The names of the dimensions of the positions.

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
        max_wavelength: float = _MAX_WAVELENGTH,
        *,
        scale_factor: float = 1.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        positions_tag: Hashable = None,
        names: Sequence[str] | None = None,
        positions_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
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
        max_wavelength: float = _MAX_WAVELENGTH,
        **options: Any,
    ) -> "ApplyRoPE":
        """Returns a layer whose positions are the side input of a tag.

        Args:
            positions_tag: The tag, as the :class:`WithSideInputsFromInputTuple` around has it.
            embedding_axis: As for the class.
            max_wavelength: As for the class.
            options: Other options of the class.

        Example:
            >>> import torch_rope
            >>> torch_rope.ApplyRoPE.from_config("tokens", embedding_axis=-1)
            ApplyRoPE(embedding_axis=-1, max_wavelength=10000.0, positions_tag='tokens')
        """
        return cls(embedding_axis, max_wavelength, positions_tag=positions_tag, **options)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns ``x`` rotated.

        Args:
            x: As for :func:`apply`.
            positions: As for :func:`apply`, or with names a tensor of dimensions of ``x`` in any
                order; by default the side input.

        Returns:
            A tensor like ``x``.

        Raises:
            ValueError: If nobody provides the positions; if the embedding axis is among the names
                of the positions, or one of these is not among those of ``x``; and as for
                :func:`apply`.
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

        plain_x, names = _without_names(x, self.names, "names", "x")
        plain_positions, positions_names = _without_names(
            positions, self.positions_names, "positions_names", "positions"
        )
        _check_names(names, positions_names, self.embedding_axis)
        axis = names.index(self.embedding_axis)
        others = names[:axis] + names[axis + 1 :]
        aligned = plain_positions.permute(
            [positions_names.index(name) for name in others if name in positions_names]
        )
        for dim, name in enumerate(others):
            if name not in positions_names:
                aligned = aligned.unsqueeze(dim)
        rotated: Any = self._rotate(plain_x, aligned, axis)
        return rotated if self.names is not None else rotated.rename(*names)  # type: ignore[no-any-return]

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
        """Shows the axis, the wavelength, and the options that are not at their defaults."""
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


def _without_names(
    tensor: Any, given: tuple[str, ...] | None, option: str, argument: str
) -> tuple[Tensor, tuple[str, ...]]:
    """Returns a tensor without names, and the names of its dimensions: those given, or its own."""
    expected = "torch_rope.ApplyRoPE(): expected"
    if given is not None:
        if len(given) != tensor.dim():
            raise ValueError(
                f"{expected} {argument} to have a dimension for each of {given}, but got shape "
                f"{tuple(tensor.shape)}"
            )
        return tensor, given
    if not hasattr(tensor, "names"):
        raise ValueError(
            f"{expected} {option} to be given for an embedding_axis that is a name, since this "
            "version of PyTorch has no named tensors, but got None"
        )
    return tensor.rename(None), tensor.names


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
        if name is None or name not in names:
            raise ValueError(
                f"{expected} every name of positions to be among those of x, {names}, but got "
                f"{name!r}"
            )


class RotaryEmbedding(nn.Module):
    """Holds frequencies, and rotates queries and keys by them.

    The frequencies, ``inv_freq``, are a buffer that ``state_dict`` leaves out, or a parameter. They
    keep their dtype whatever ``module.to(dtype)``, ``half()`` and the like do: bfloat16 frequencies
    would turn distant tokens by wrong angles. Mixed precision of FSDP2 casts every parameter of a
    group: where frequencies are a parameter, ``fully_shard`` this module by itself, without it.

    With the types ``dynamic`` and ``longrope``, frequencies follow ``seq_len`` of each call, or
    where that is not given the greatest position plus one, found on the device without a wait for
    it. Nothing is remembered from call to call.

    ``torch.jit.script`` compiles the module. In TorchScript ``forward`` takes ``q`` and ``k``, and
    one tensor is for the method ``rotate``. Converting the dtype of a scripted module converts its
    frequencies too, and the operators refuse them.

    Args:
        rotary_dim: How many elements are rotated, even.
        rope_parameters: The scheme of the frequencies, as for :func:`frequencies`.
        max_position_embeddings: As for :func:`frequencies`.
        max_wavelength: The base of the frequencies, where ``rope_parameters`` have no
            ``rope_theta``.
        inv_freq: Frequencies of your own instead of a scheme, as for :func:`apply`: ``(N,)``, or
            ``(A, N)`` for positions along ``A`` axes.
        attention_factor: Multiplies the rotated elements; by default that of the scheme.
        learned: Whether the frequencies are a parameter. Not for ``dynamic`` and ``longrope``.
        embedding_axis: The dimension that is rotated.
        rotary_offset: The first element that is rotated.
        interleaved: Whether pairs are adjacent elements instead of the two halves.
        device: The device of the frequencies; by default PyTorch's default device.

    Raises:
        ValueError: If options do not fit, and as for :func:`frequencies`.
        TypeError: As for :func:`frequencies`.

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

    def __init__(
        self,
        rotary_dim: int,
        rope_parameters: Mapping[str, Any] | None = None,
        *,
        max_position_embeddings: int | None = None,
        max_wavelength: float = _MAX_WAVELENGTH,
        inv_freq: Tensor | None = None,
        attention_factor: float | None = None,
        learned: bool = False,
        embedding_axis: int = -1,
        rotary_offset: int = 0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_dim
        self.embedding_axis = embedding_axis
        self.rotary_offset = rotary_offset
        self.interleaved = interleaved
        self.learned = learned
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = _with_theta(rope_parameters, max_wavelength, inv_freq)
        self.rope_type = None if inv_freq is not None else _type_of(self.rope_parameters)
        if learned and self.rope_type in _FOLLOWING_LENGTH:
            raise ValueError(
                "torch_rope.RotaryEmbedding(): expected learned to be False for a rope_type whose "
                f"frequencies follow the length, but got True for {self.rope_type}"
            )

        if inv_freq is None:
            formed = self._form(None, device)
        else:
            copy = inv_freq.detach().clone()
            formed = Frequencies(copy if device is None else copy.to(device), 1.0)
        self.attention_factor = formed.attention_factor
        if attention_factor is not None:
            self.attention_factor = float(attention_factor)
        if learned:
            self.inv_freq = nn.Parameter(formed.inv_freq)
        else:
            self.register_buffer("inv_freq", formed.inv_freq, persistent=False)

        # The length beyond which the frequencies change, 0 where they never do; and what they then
        # are, or are formed from.
        self._trained_length, self._rope_theta, self._factor = 0, 0.0, 0.0
        self.register_buffer("long_inv_freq", None, persistent=False)
        if self.rope_type == "longrope":
            self._trained_length = self.rope_parameters["original_max_position_embeddings"]
            self.long_inv_freq = self._form(self._trained_length + 1, device).inv_freq
        elif self.rope_type == "dynamic":
            assert max_position_embeddings is not None  # frequencies() has seen to it.
            self._trained_length = max_position_embeddings
            self._rope_theta = float(self.rope_parameters["rope_theta"])
            self._factor = float(self.rope_parameters["factor"])

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

        Which elements form a pair is a matter of the model's code and not of its configuration:
        most have halves, and for the others (GPT-J, Cohere, GLM) ``interleaved=True`` is to be
        given.

        An object is surer than a dictionary, where models have names of their own for sizes.

        Args:
            config: The configuration, or the dictionary of its ``config.json``:
                ``rope_parameters``, or the older ``rope_scaling`` and ``rope_theta`` (10000 where
                it is missing); ``head_dim``, or ``hidden_size`` and ``num_attention_heads``;
                ``partial_rotary_factor``; ``max_position_embeddings``. Of a model of several parts
                the ``text_config`` is taken.
            layer_type: The type of layer, such as ``sliding_attention``, where ``rope_parameters``
                differ from one type to the other.
            mrope_interleaved: Where the configuration has an ``mrope_section``, whether axes take
                turns (see :func:`mrope_frequencies`); by default what the configuration says.
            options: ``interleaved`` and other options of the class.

        Raises:
            ValueError: If the configuration lacks what is needed, or ``layer_type`` is missing or
                unknown.

        Example:
            >>> import torch_rope
            >>> config = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0}
            >>> torch_rope.RotaryEmbedding.from_config(config)
            RotaryEmbedding(128, rope_type='default')
        """
        rotary_dim, parameters, max_position_embeddings, sections = read_config(config, layer_type)
        if sections is None:
            return cls(
                rotary_dim, parameters, max_position_embeddings=max_position_embeddings, **options
            )

        name = "torch_rope.RotaryEmbedding.from_config()"
        if mrope_interleaved is None:
            mrope_interleaved = parameters.get("mrope_interleaved")
        if mrope_interleaved is None:
            raise ValueError(
                f"{name}: expected mrope_interleaved to be given for a config with mrope_section "
                "that does not say it, but got None"
            )
        if parameters["rope_type"] in _FOLLOWING_LENGTH:
            raise ValueError(
                f"{name}: expected rope_type not to be one of {_FOLLOWING_LENGTH} together with "
                f"mrope_section, but got {parameters['rope_type']!r}"
            )
        inv_freq, attention_factor = frequencies(
            parameters, rotary_dim, max_position_embeddings=max_position_embeddings
        )
        inv_freq = mrope_frequencies(inv_freq, sections, interleaved=mrope_interleaved)
        options.setdefault("attention_factor", attention_factor)
        return cls(rotary_dim, inv_freq=inv_freq, **options)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, x: Tensor, positions: Tensor, /, *, seq_len: int | None = None
        ) -> Tensor: ...

        @overload
        def __call__(
            self, q: Tensor, k: Tensor, positions: Tensor, seq_len: int | None = None
        ) -> tuple[Tensor, Tensor]: ...

        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        positions: Tensor | None = None,
        seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns queries and keys rotated; of ``forward(x, positions)`` one tensor.

        Args:
            q: As ``x`` for :func:`apply`.
            k: As ``q``; rotated by the same angles.
            positions: As for :func:`apply`.
            seq_len: The length that frequencies are for, with the types ``dynamic`` and
                ``longrope``.

        Returns:
            Tensors like ``q`` and ``k``.

        Raises:
            ValueError: As for :func:`apply`.
            TypeError: As for :func:`apply`.
            IndexError: As for :func:`apply`.
        """
        if not is_scripting():
            if positions is None or k is None:
                given = k if positions is None else positions
                if given is None:
                    raise TypeError(
                        "torch_rope.RotaryEmbedding(): expected positions to be a tensor, but got "
                        "None"
                    )
                rotated: Any = self.rotate(q, given, seq_len)
                return cast(tuple[Tensor, Tensor], rotated)
            return apply(
                (q, k),
                positions,
                self._inv_freq_at(positions, seq_len),
                embedding_axis=self.embedding_axis,
                rotary_dim=self.rotary_dim,
                rotary_offset=self.rotary_offset,
                attention_factor=self.attention_factor,
                interleaved=self.interleaved,
            )
        assert k is not None, "In TorchScript forward takes q, k and positions"
        assert positions is not None, "In TorchScript forward takes q, k and positions"
        pair: tuple[Tensor, Tensor] = torch.ops.rope.apply_qk(
            q,
            k,
            positions,
            self._inv_freq_at(positions, seq_len),
            embedding_axis=self.embedding_axis,
            rotary_dim=self.rotary_dim,
            rotary_offset=self.rotary_offset,
            attention_factor=self.attention_factor,
            interleaved=self.interleaved,
        )
        return pair

    @torch.jit.export
    def rotate(self, x: Tensor, positions: Tensor, seq_len: int | None = None) -> Tensor:
        """Returns one tensor rotated; what ``forward(x, positions)`` does, also in TorchScript.

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

    def _inv_freq_at(self, positions: Tensor, seq_len: int | None) -> Tensor:
        """Returns the frequencies for a length: seq_len, or the greatest position plus one."""
        if self._trained_length == 0 or positions.numel() == 0:
            return self.inv_freq
        if seq_len is not None and seq_len <= self._trained_length:
            return self.inv_freq
        long_inv_freq = self.long_inv_freq
        if seq_len is not None and long_inv_freq is not None:
            return long_inv_freq
        if seq_len is None:
            length = positions.max() + 1
        else:
            length = torch.full((), seq_len, dtype=torch.int64, device=positions.device)
        if long_inv_freq is not None:
            return torch.where(length > self._trained_length, long_inv_freq, self.inv_freq)
        inv_freq: Tensor = torch.ops.rope._dynamic_frequencies(
            length,
            self.rotary_dim,
            self._rope_theta,
            self._factor,
            self._trained_length,
            self.inv_freq.dtype,
        )
        return inv_freq

    def reset_parameters(self) -> None:
        """Forms the frequencies anew, in place; for modules built on the meta device.

        Raises:
            RuntimeError: If the module was given ``inv_freq``, which it does not keep.
        """
        if self.rope_type is None:
            raise RuntimeError(
                "torch_rope.RotaryEmbedding.reset_parameters(): expected the frequencies to be of "
                "a scheme, but they were given as inv_freq: copy them to module.inv_freq"
            )
        with torch.no_grad():
            self.inv_freq.copy_(self._form(None, "cpu").inv_freq)
            if self.long_inv_freq is not None:
                self.long_inv_freq.copy_(self._form(self._trained_length + 1, "cpu").inv_freq)

    def extra_repr(self) -> str:
        """Shows the options that are not at their defaults."""
        shown = [str(self.rotary_dim), f"rope_type={self.rope_type!r}"]
        if self.attention_factor != 1.0:
            shown.append(f"attention_factor={self.attention_factor}")
        for name in ("interleaved", "learned"):
            if getattr(self, name):
                shown.append(f"{name}=True")
        return ", ".join(shown)

    def _form(self, seq_len: int | None, device: torch.device | str | None) -> Frequencies:
        return frequencies(
            self.rope_parameters,
            self.rotary_dim,
            max_position_embeddings=self.max_position_embeddings,
            seq_len=seq_len,
            device=device,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Moves the frequencies where fn does, and keeps their dtype."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


def _with_theta(
    rope_parameters: Mapping[str, Any] | None, max_wavelength: float, inv_freq: Tensor | None
) -> dict[str, Any]:
    """Returns a copy of the scheme with its rope_theta; nothing where inv_freq takes its place."""
    expected = "torch_rope.RotaryEmbedding(): expected"
    parameters = dict(rope_parameters or {})
    if inv_freq is not None and rope_parameters is not None:
        raise ValueError(f"{expected} rope_parameters or inv_freq, but got both")
    fixed = parameters.get("rope_theta") is not None or inv_freq is not None
    if fixed and max_wavelength != _MAX_WAVELENGTH:
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
