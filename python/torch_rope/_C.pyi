"""The operators, called through typed handles, and the frequencies."""

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor, device, dtype

has_cuda: bool  # whether this build has the CUDA kernels

# The operators take the arguments of their schemas, all of them, by position.
def apply(x: Tensor, /, *arguments: Tensor | float | None) -> Tensor: ...
def apply_qk(
    q: Tensor, k: Tensor, /, *arguments: Tensor | float | None
) -> tuple[Tensor, Tensor]: ...
def apply_(x: Tensor, /, *arguments: Tensor | float | None) -> None: ...
def apply_qk_(q: Tensor, k: Tensor, /, *arguments: Tensor | float | None) -> None: ...
def apply_cos_sin(x: Tensor, /, *arguments: Tensor | float | None) -> Tensor: ...
def apply_cos_sin_qk(
    q: Tensor, k: Tensor, /, *arguments: Tensor | float | None
) -> tuple[Tensor, Tensor]: ...
def apply_cos_sin_(x: Tensor, /, *arguments: Tensor | float | None) -> None: ...
def apply_cos_sin_qk_(q: Tensor, k: Tensor, /, *arguments: Tensor | float | None) -> None: ...
def norm_apply(
    x: Tensor, weight: Tensor | None, /, *arguments: Tensor | Sequence[int] | float | None
) -> Tensor: ...
def norm_apply_qk(
    q: Tensor, k: Tensor, /, *arguments: Tensor | Sequence[int] | float | None
) -> tuple[Tensor, Tensor]: ...
def norm_apply_(
    x: Tensor, weight: Tensor | None, /, *arguments: Tensor | Sequence[int] | float | None
) -> None: ...
def norm_apply_qk_(
    q: Tensor, k: Tensor, /, *arguments: Tensor | Sequence[int] | float | None
) -> None: ...
def norm_apply_cos_sin(
    x: Tensor, weight: Tensor | None, /, *arguments: Tensor | Sequence[int] | float | None
) -> Tensor: ...
def norm_apply_cos_sin_qk(
    q: Tensor, k: Tensor, /, *arguments: Tensor | Sequence[int] | float | None
) -> tuple[Tensor, Tensor]: ...
def norm_apply_cos_sin_(
    x: Tensor, weight: Tensor | None, /, *arguments: Tensor | Sequence[int] | float | None
) -> None: ...
def norm_apply_cos_sin_qk_(
    q: Tensor, k: Tensor, /, *arguments: Tensor | Sequence[int] | float | None
) -> None: ...
def frequencies(
    rope_parameters: dict[str, Any],
    rotary_dim: int,
    max_position_embeddings: int | None,
    seq_len: int | None,
    dtype: dtype,
    device: device,
    /,
) -> tuple[Tensor, float]: ...
def axial_frequencies(
    rotary_dims: tuple[int, ...], max_wavelength: float, dtype: dtype, device: device, /
) -> Tensor: ...
def mrope_frequencies(
    inv_freq: Tensor, sections: tuple[int, ...], interleaved: bool, /
) -> Tensor: ...
def mixed_frequencies(
    rotary_dim: int,
    num_heads: int,
    max_wavelength: float,
    generator: Generator | None,
    dtype: dtype,
    device: device,
    /,
) -> Tensor: ...
