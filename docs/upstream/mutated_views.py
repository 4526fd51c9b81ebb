"""TorchInductor and operators that mutate views.

``auto_functionalized_v2`` records how to regenerate each mutated view from its base. TorchInductor
loses the view's storage offset where it is a symbol, records a slice of an argument as if the
argument began at the start of its storage, and removes a clone of such an argument as redundant.
"""

from collections.abc import Callable

import torch
from torch import Tensor

library = torch.library.Library("reproducer", "DEF")
library.define("double_(Tensor(a!) x) -> ()")
library.impl("double_", lambda x: None, "Meta")


def double_(x: Tensor) -> None:
    """The kernel of the operator."""
    x.mul_(2)


library.impl("double_", double_, "CPU")


def symbolic_offset(x: Tensor) -> Tensor:
    """Mutates a view whose storage offset is a symbol, if sizes are dynamic."""
    copy = x * 3
    torch.ops.reproducer.double_(copy[1])
    return copy


def slice_of_argument(x: Tensor) -> Tensor:
    """Mutates a slice of an argument."""
    torch.ops.reproducer.double_(x[..., :1, :])
    return x + 1


def clone_of_argument(x: Tensor) -> Tensor:
    """Mutates a clone of an argument."""
    clone = x.clone()
    torch.ops.reproducer.double_(clone)
    return clone + x


@torch.no_grad()
def is_present(function: Callable[[Tensor], Tensor], dynamic: bool, in_packed: bool) -> bool:
    """Compares compiled with eager results, and with what they leave in the argument."""
    torch.compiler.reset()
    results = []
    for form in (function, torch.compile(function, dynamic=dynamic, fullgraph=True)):
        packed = torch.arange(3.0 * 2 * 5 * 4 * 8).view(3, 2, 5, 4, 8)
        results.append((form(packed[1] if in_packed else packed), packed))
    eager, compiled = results
    return not all(torch.equal(*pair) for pair in zip(eager, compiled, strict=True))


CASES = {
    "a view with a symbolic offset": (symbolic_offset, True, False),
    "a slice of an argument with an offset": (slice_of_argument, False, True),
    "a clone of an argument with an offset": (clone_of_argument, False, True),
}

if __name__ == "__main__":
    print(f"torch {torch.__version__}:")
    for name, case in CASES.items():
        print(f"  {name}: {'PRESENT' if is_present(*case) else 'absent'}")
