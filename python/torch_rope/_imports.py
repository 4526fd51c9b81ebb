"""Modules of ours that belong to one of another package, and are imported once that one is."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Companion(MetaPathFinder):
    """Finds a module as Python does, and lets its import end with that of ours."""

    def __init__(self, name: str, ours: str) -> None:
        self.name = name
        self.ours = ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_both(module: ModuleType) -> None:
            execute(module)
            import_module(self.ours)

        # Of this loader alone: it was made for this one module.
        spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec


def import_after(name: str, ours: str) -> None:
    """Imports the module ``ours`` as soon as the module ``name`` is there, be it now or later."""
    if name in sys.modules:
        import_module(ours)
    else:
        sys.meta_path.insert(0, _Companion(name, ours))
