"""The operators, by the quick way, and the frequencies; their arguments are those of torch_rope."""

from typing import Any

from torch import Generator, Tensor, device, dtype

has_cuda: bool  # whether this build has the CUDA kernels

def apply(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None,
    embedding_axis: int,
    rotary_dim: int | None,
    rotary_offset: int,
    max_wavelength: float,
    scale_factor: float,
    attention_factor: float,
    interleaved: bool,
    conjugate: bool,
    /,
) -> Tensor: ...
def apply_qk(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None,
    embedding_axis: int,
    rotary_dim: int | None,
    rotary_offset: int,
    max_wavelength: float,
    scale_factor: float,
    attention_factor: float,
    interleaved: bool,
    conjugate: bool,
    /,
) -> tuple[Tensor, Tensor]: ...
def apply_(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None,
    embedding_axis: int,
    rotary_dim: int | None,
    rotary_offset: int,
    max_wavelength: float,
    scale_factor: float,
    attention_factor: float,
    interleaved: bool,
    conjugate: bool,
    /,
) -> None: ...
def apply_qk_(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None,
    embedding_axis: int,
    rotary_dim: int | None,
    rotary_offset: int,
    max_wavelength: float,
    scale_factor: float,
    attention_factor: float,
    interleaved: bool,
    conjugate: bool,
    /,
) -> None: ...
def apply_cos_sin(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    embedding_axis: int,
    rotary_dim: int | None,
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
    full_width: bool,
    /,
) -> Tensor: ...
def apply_cos_sin_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    embedding_axis: int,
    rotary_dim: int | None,
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
    full_width: bool,
    /,
) -> tuple[Tensor, Tensor]: ...
def apply_cos_sin_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    embedding_axis: int,
    rotary_dim: int | None,
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
    full_width: bool,
    /,
) -> None: ...
def apply_cos_sin_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    embedding_axis: int,
    rotary_dim: int | None,
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
    full_width: bool,
    /,
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
