"""Times calls in turn, so that a slow moment of the machine affects all of them."""

import collections
import functools
import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import memory
import torch
from torch import Tensor


@dataclass
class Timing:
    """Seconds of one call.

    Attributes:
        median: Over the rounds.
        spread: The interquartile range divided by the median.
        page_faults: Pages (of 4 KB, or huge) that the system had to map, per call.
    """

    median: float
    spread: float
    page_faults: float


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    device: str,
    give_memory_back: bool = False,
) -> dict[str, Timing]:
    """Times each call for about ``seconds`` in each round.

    Args:
        calls: The calls by name. Half a turn of warm-up precedes each turn.
        rounds: How many times to time all of them in turn; at least 2.
        seconds: How long to repeat each call in a round. Results are dropped at once, so the next
            call can reuse their memory.
        device: ``"cpu"``; ``"cuda"``, for whole programs: each call is timed with its own events
            and finds the L2 full of other data (``time_graphs`` is for single operators); or
            ``"host"``: the CPU time of calls while a CUDA device works or is idle.
        give_memory_back: Whether glibc's heap returns its free memory to the system before each
            turn. Otherwise memory freed by one call can be reused by another, and a large result
            might by chance get warm pages.
    """
    time_calls = {"cpu": _time_on_cpu, "cuda": _time_on_cuda, "host": _time_on_host}[device]
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(seconds / time_calls(call, 1)))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    faults: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            if give_memory_back:
                memory.give_back()
            time_calls(call, max(1, repeats[name] // 2))  # Warms up caches and the heap.
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            samples[name].append(time_calls(call, repeats[name]))
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            faults[name].append((after - before) / repeats[name])
    gc.enable()
    return {name: _summarize(samples[name], faults[name]) for name in calls}


# The functions below return the seconds of one call.


def _time_on_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _time_on_host(call: Callable[[], object], repeats: int) -> float:
    torch.cuda.synchronize()  # The CPU would block on a full launch queue.
    return _time_on_cpu(call, min(repeats, 500))


def _time_on_cuda(call: Callable[[], object], repeats: int) -> float:
    other = _other_data()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        other.sum()  # A read: dirty lines to write back would slow the call.
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


@functools.cache
def _other_data() -> Tensor:
    """Four times the size of the L2; reading it also hides the host's work."""
    return torch.zeros(max(l2_size(), 2**25), dtype=torch.float32, device="cuda")


# --- One operator on a GPU ------------------------------------------------------------------------

# How many times a graph uses each set of buffers.
ROUNDS_OF_A_GRAPH = 6


@dataclass
class Graph:
    """Calls captured back to back.

    Attributes:
        graph: The CUDA graph.
        calls: The number of calls.
    """

    graph: torch.cuda.CUDAGraph
    calls: int


def l2_size() -> int:
    """Returns the size of the L2 of the current device, in bytes."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.L2_cache_size)


def count_buffers(nbytes: int, cache: int) -> int:
    """Returns how many sets of buffers to cycle through.

    Together they are eight times the size of the cache, so a call finds nothing there. At most 16:
    tiny buffers stay in the cache, as they do in a program.

    Args:
        nbytes: The bytes that one call reads and writes.
        cache: The size of the L2.
    """
    return min(16, max(4, -(-8 * cache // max(1, nbytes))))


def capture(calls: Sequence[Callable[[], object]]) -> Graph:
    """Captures several rounds of calls that differ in their buffers.

    A result lives until its call is repeated, so output buffers are not reused sooner than inputs.
    The current stream must not be the default one, which cannot be captured, and autograd graphs to
    run backward must have been recorded on it.
    """
    for _ in range(2):  # Loads and compiles code; tables are complete after the second round.
        for call in calls:
            call()
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    results = collections.deque[object](maxlen=len(calls))
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(ROUNDS_OF_A_GRAPH):
            for call in calls:
                results.append(call())
    return Graph(graph, ROUNDS_OF_A_GRAPH * len(calls))


def time_graphs(graphs: Mapping[str, Graph], rounds: int) -> dict[str, Timing]:
    """Times a call of each graph, from ``rounds`` replays of all graphs in turn; at least 2."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(1 + rounds):
        for name, graph in graphs.items():
            samples[name].append(_time_replay(graph))
    # The GPU's clocks ramp up in the first round.
    return {name: _summarize(seconds[1:], [0.0]) for name, seconds in samples.items()}


def _time_replay(graph: Graph) -> float:
    """Returns the seconds of one of the calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.graph.replay()  # While it runs, the host enqueues the timed replay.
    start.record()
    graph.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / graph.calls


def _summarize(samples: list[float], faults: list[float]) -> Timing:
    quarter, median, three_quarters = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (three_quarters - quarter) / median, statistics.median(faults))
