"""CUDA graphs of calls."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def capture(
    call: Callable[[], T], *, warm_up: bool = True, mode: str = "global"
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Captures a call.

    Args:
        call: What the graph does when it is replayed.
        warm_up: Whether the call runs before, on a side stream.
        mode: What other calls of CUDA the capture forbids: ``capture_error_mode``.

    Returns:
        The graph, and what the call returned, which a replay writes.
    """
    if warm_up:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        captured = call()
    return graph, captured
