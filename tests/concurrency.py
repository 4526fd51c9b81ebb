"""Many threads that start together."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

THREADS = 8


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """Calls a function in many threads that start together; returns what it returned in each."""
    barrier = Barrier(THREADS)

    def start(thread: int) -> Any:
        barrier.wait()
        return work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start, range(THREADS)))
