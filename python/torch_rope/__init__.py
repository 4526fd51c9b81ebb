"""Rotary position embedding (arXiv 2104.09864) as PyTorch operators.

``apply`` rotates by positions, ``apply_cos_sin`` by the caller's tables; ``apply_`` and
``apply_cos_sin_`` do the same in place. ``norm_apply`` and its siblings also take the RMSNorm that
most models apply before they rotate. TorchScript calls the operators as ``torch.ops.rope.apply``
and so on, C++ as ``rope::apply``. The layers ``RotaryEmbedding``, ``QKNormRotaryEmbedding`` and
``ApplyRoPE`` are built on them, with frequencies from ``frequencies`` and similar functions.
"""

import warnings as _warnings
from importlib import import_module as _import_module
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import TYPE_CHECKING

# PyTorch warns on import where NumPy is missing. Nothing here needs it, and what does raises.
_warnings.filterwarnings("ignore", "Failed to initialize NumPy")

# This also loads the libraries of PyTorch, wherever they are, before librope.so.
from torch_rope._built_for import find_libraries as _find_libraries

if _libraries := _find_libraries():
    __path__.append(str(_libraries))  # for _C

from torch_rope import _C as _C
from torch_rope import _nested as _nested
from torch_rope import _vmap as _vmap
from torch_rope._compile import composed
from torch_rope._frequencies import (
    Frequencies,
    axial_frequencies,
    frequencies,
    mixed_frequencies,
    mrope_frequencies,
)
from torch_rope._layers import ApplyRoPE, RotaryEmbedding
from torch_rope._norm_layers import QKNormRotaryEmbedding
from torch_rope._norm_operators import (
    norm_apply,
    norm_apply_,
    norm_apply_cos_sin,
    norm_apply_cos_sin_,
)
from torch_rope._operators import apply, apply_, apply_cos_sin, apply_cos_sin_
from torch_rope._positions import (
    context_parallel_positions,
    grid_positions,
    positions_from_attention_mask,
    positions_from_cu_seqlens,
)
from torch_rope._side_inputs import WithSideInputsFromInputTuple, keep_side_inputs
from torch_rope._subclasses import register_with_dtensor as _register_with_dtensor
from torch_rope._weights import permute_half_to_interleaved, permute_interleaved_to_half

_register_with_dtensor()  # For torch.ops.rope; the functions of this package do it themselves.

__all__ = [
    "ApplyRoPE",
    "Frequencies",
    "QKNormRotaryEmbedding",
    "RotaryEmbedding",
    "WithSideInputsFromInputTuple",
    "apply",
    "apply_",
    "apply_cos_sin",
    "apply_cos_sin_",
    "axial_frequencies",
    "cmake_prefix_path",
    "composed",
    "context_parallel_positions",
    "frequencies",
    "grid_positions",
    "keep_side_inputs",
    "mixed_frequencies",
    "mrope_frequencies",
    "norm_apply",
    "norm_apply_",
    "norm_apply_cos_sin",
    "norm_apply_cos_sin_",
    "permute_half_to_interleaved",
    "permute_interleaved_to_half",
    "positions_from_attention_mask",
    "positions_from_cu_seqlens",
]

if TYPE_CHECKING:
    from torch_rope import integrations as integrations
else:

    def __getattr__(name: str) -> object:
        """Imports the integrations on first use."""
        if name == "integrations":
            return _import_module("torch_rope.integrations")
        raise AttributeError(f"module 'torch_rope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "integrations", *(name for name in globals() if name[:2] == "__")])


__version__ = _version("torch-rope")

#: The folder to add to ``CMAKE_PREFIX_PATH`` for ``find_package(rope)``.
cmake_prefix_path = str(_Path(__file__).parent)
