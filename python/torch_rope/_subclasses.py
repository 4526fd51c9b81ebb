"""The registration with DTensor, whose import takes a quarter of the time of torch's own.

That import is left to the user. If it comes after the import of this package, the operators are
registered on the first call of one of this package's functions with a tensor subclass.
(``torch.ops.rope`` called before that raises DTensor's NotImplementedError: no sharding strategy.)
"""

import sys


def register_with_dtensor() -> None:
    """Registers the operators if something has imported DTensor."""
    if "torch.distributed.tensor" in sys.modules:
        from torch_rope import _dtensor as _dtensor
