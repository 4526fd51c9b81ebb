"""torch-rope in other projects' models; each module is imported on first access."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

__all__ = ["flash_attn", "onnx", "torchtitan", "torchtune", "transformers"]

if TYPE_CHECKING:
    from torch_rope.integrations import flash_attn, onnx, torchtitan, torchtune, transformers
else:

    def __getattr__(name: str) -> object:
        """Imports a module of this package; none requires its project to be installed."""
        if name in __all__:
            return _import_module(f"torch_rope.integrations.{name}")
        raise AttributeError(f"module 'torch_rope.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name[:2] == "__")])
