"""Controls glibc's handling of freed memory, which decides whether a fresh result has pages yet.

By default blocks of up to 32 MB, once a program has freed some, come from a heap that keeps freed
memory; larger ones come from the system, page by page, and are returned to it. Without glibc these
functions do nothing.
"""

import ctypes
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory() -> None:
    """Returns no memory to the system: repeated calls reuse the pages of the previous one."""
    _call("mallopt", M_MMAP_MAX, 0)
    _call("mallopt", M_TRIM_THRESHOLD, -1)


def take_from_heap(size: int) -> None:
    """Allocates blocks of up to ``size`` bytes from the heap, larger ones from the system."""
    _call("mallopt", M_MMAP_THRESHOLD, size)
    _call("mallopt", M_TRIM_THRESHOLD, 2 * size)


def give_back() -> None:
    """Returns the heap's free memory to the system."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function: Any = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
