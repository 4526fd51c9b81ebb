"""The operators, by the quick way; what each argument is stands with torch_rope's functions."""

from torch import Tensor

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
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
    /,
) -> Tensor: ...
def apply_cos_sin_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    embedding_axis: int,
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
    /,
) -> tuple[Tensor, Tensor]: ...
def apply_cos_sin_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    embedding_axis: int,
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
    /,
) -> None: ...
def apply_cos_sin_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    embedding_axis: int,
    rotary_offset: int,
    interleaved: bool,
    conjugate: bool,
    /,
) -> None: ...
