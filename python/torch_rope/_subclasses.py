"""The registration with DTensor, whose import takes a fourth of the time of torch's own.

That import is left to the user. If it comes after this package's, the operators are registered when
the functions of this package are first given a tensor subclass. (``torch.ops.rope`` called before
that raises DTensor's NotImplementedError: no sharding strategy.)
"""

import sys


def register_with_dtensor() -> None:
    """Registers the operators if something has imported DTensor."""
    if "torch.distributed.tensor" in sys.modules:
        from torch_rope import _dtensor as _dtensor
