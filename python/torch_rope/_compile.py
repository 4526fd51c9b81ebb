"""What torch.compile traces: the operators, or their decomposition into ATen operators."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Form(threading.local):
    """The choice of a thread. The compiler guards on it."""

    def __init__(self) -> None:
        self.is_composed = False


_form = _Form()


@contextmanager
def composed(enabled: bool = True) -> Iterator[None]:
    """Makes ``torch.compile`` and ``torch.export`` trace the rotation as ATen operators.

    By default a compiled program calls the same kernels as an eager one, and gets the same bits.
    Inside this context it traces ``torch.ops.rope.apply_composed`` or ``apply_cos_sin_composed``
    instead, whose ATen operators the compiler may fuse with those around them. A program exported
    this way does not need the library. ``benchmarks/bench_compile.py`` compares the two.

    The context may be entered inside a compiled function or around its call: the choice is part of
    the graph, and a function that was compiled without it is recompiled. It holds for one thread.
    Eager calls use the kernels, inside it too.

    Args:
        enabled: Whether to trace the decomposition; ``False`` returns to the kernels within an
            outer ``composed()``.

    Example:
        >>> import torch, torch_rope
        >>> @torch.compile(backend="eager")
        ... def rotate(x, positions):
        ...     with torch_rope.composed():
        ...         return torch_rope.apply(x, positions)
        >>> x, positions = torch.randn(5, 64), torch.arange(5)
        >>> torch.allclose(rotate(x, positions), torch_rope.apply(x, positions), atol=1e-5)
        True
    """
    before = _form.is_composed
    _form.is_composed = enabled
    try:
        yield
    finally:
        _form.is_composed = before


def call_traced(
    name: str,
    rotated: tuple[Tensor, ...],
    tensors: tuple[Tensor | None, ...],
    options: Mapping[str, object],
) -> Any:
    """Calls an operator, or its decomposition, while a compiler traces."""
    if not _form.is_composed:
        return getattr(torch.ops.rope, name).default(*rotated, *tensors, **options)
    family = name.removesuffix("_").removesuffix("_qk")
    compose = getattr(torch.ops.rope, f"{family}_composed").default
    others = [tensors] * len(rotated)
    if name.startswith("norm_") and len(rotated) == 2:
        q_weight, k_weight, *angles = tensors
        others = [(q_weight, *angles), (k_weight, *angles)]
    calls = list(zip(rotated, others, strict=True))
    if name.endswith("_"):
        # The gradients of angles, tables and norms need x as it was.
        results = tuple(compose(x.clone(), *rest, **options) for x, rest in calls)
        for x, result in zip(rotated, results, strict=True):
            x.copy_(result)
        return None
    results = tuple(compose(x, *rest, **options) for x, rest in calls)
    return results if len(results) > 1 else results[0]
