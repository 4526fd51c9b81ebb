"""Rotary position embedding (arXiv 2104.09864) as PyTorch operators.

``apply`` rotates by positions, ``apply_cos_sin`` by the caller's tables; ``apply_`` and
``apply_cos_sin_`` do so in place. The same operators are ``torch.ops.rope.apply`` and so on in
TorchScript, and ``rope::apply`` in C++.
"""

from importlib.metadata import version as _version
from pathlib import Path as _Path

import torch  # noqa: F401  Loads the libraries of PyTorch, wherever they are, before librope.so.

from torch_rope import _C as _C
from torch_rope import _nested as _nested
from torch_rope import _vmap as _vmap
from torch_rope._compile import composed
from torch_rope._imports import import_after as _import_after
from torch_rope._operators import apply, apply_, apply_cos_sin, apply_cos_sin_

# DTensor's own import takes a third as long as that of torch.
_import_after("torch.distributed.tensor", "torch_rope._dtensor")

__all__ = ["apply", "apply_", "apply_cos_sin", "apply_cos_sin_", "cmake_prefix_path", "composed"]

__version__ = _version("torch-rope")

#: The folder for ``CMAKE_PREFIX_PATH`` with which a CMake project finds the package ``rope``.
cmake_prefix_path = str(_Path(__file__).parent)
