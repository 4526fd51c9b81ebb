"""What glibc does with freed memory, which decides whether a fresh result has pages already.

By default blocks of up to 32 MB, once a program has freed some, come from a heap that keeps freed
memory; larger ones come from the system, page by page, and go back to it. Elsewhere than on Linux
with glibc these functions do nothing.
"""

import ctypes
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory() -> None:
    """Gives nothing back to the system: repeated calls find the pages of the one before."""
    _call("mallopt", M_MMAP_MAX, 0)
    _call("mallopt", M_TRIM_THRESHOLD, -1)


def take_from_heap(size: int) -> None:
    """Takes blocks of up to ``size`` bytes from the heap, and larger ones from the system."""
    _call("mallopt", M_MMAP_THRESHOLD, size)
    _call("mallopt", M_TRIM_THRESHOLD, 2 * size)


def give_back() -> None:
    """Gives what is free in the heap back to the system."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function: Any = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
