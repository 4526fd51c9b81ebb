"""PyTorch's fallback for lazily negated views, and operators that mutate and return nothing.

The fallback for the key Negative resolves the view, calls the operator on a copy, and then takes
the operator's return value to be the argument it changed. An operator with the schema
``(Tensor(a!) x) -> ()`` returns nothing: the fallback reads whatever lies below its arguments on
the dispatcher's stack. Called from Python, where nothing does, it raises. Called from C++, it can
corrupt memory.
"""

import torch
from torch import Tensor

library = torch.library.Library("reproducer", "DEF")
library.define("double_(Tensor(a!) x) -> ()")


def double_(x: Tensor) -> None:
    """The kernel of the operator."""
    x.mul_(2)


library.impl("double_", double_, "CPU")


def is_present() -> bool:
    """Doubles the imaginary part of a conjugated tensor."""
    x = torch.view_as_complex(torch.arange(6.0).view(3, 2)).conj().imag
    assert x.is_neg()
    expected = x.resolve_neg() * 2
    try:
        torch.ops.reproducer.double_(x)
    except RuntimeError as error:
        print(f"  {error}")
        return True
    return not torch.equal(x.resolve_neg(), expected)


if __name__ == "__main__":
    print(f"torch {torch.__version__}: {'PRESENT' if is_present() else 'absent'}")
