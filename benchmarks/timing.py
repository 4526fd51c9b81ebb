"""Times calls in turns, so that a slow moment of the machine falls on all of them."""

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
        spread: Distance between the quartiles over the median.
        page_faults: Of one call: pages of 4 KB (or huge ones) that the system had to hand out.
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
        calls: What is timed, by name. A turn starts with a half of it that is not counted.
        rounds: How many times all of them are timed, in turn; at least 2.
        seconds: How long one call is repeated in a round. Results are dropped at once, so that the
            next call can have their memory.
        device: ``"cpu"``; ``"cuda"``, for whole programs, where each call is timed by events of its
            own and finds the L2 full of other data (``time_graphs`` is for a single operator); or
            ``"host"``: what calls take of the CPU while a CUDA device works, or is idle.
        give_memory_back: Whether glibc's heap gives its free memory to the system before each turn.
            Otherwise what one call frees can serve another: a large result would by chance have
            pages that are there already.
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
            time_calls(call, max(1, repeats[name] // 2))  # Caches and the heap as they will be.
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            samples[name].append(time_calls(call, repeats[name]))
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            faults[name].append((after - before) / repeats[name])
    gc.enable()
    return {name: _summarize(samples[name], faults[name]) for name in calls}


# These return the seconds of one call.


def _time_on_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _time_on_host(call: Callable[[], object], repeats: int) -> float:
    torch.cuda.synchronize()  # A full queue of launches would let the CPU wait.
    return _time_on_cpu(call, min(repeats, 500))


def _time_on_cuda(call: Callable[[], object], repeats: int) -> float:
    other = _other_data()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        other.sum()  # Read, not written: what is to be written back would slow the call.
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


@functools.cache
def _other_data() -> Tensor:
    """Four times what the L2 holds; to read it also hides what the host does."""
    return torch.zeros(max(l2_size(), 2**25), dtype=torch.float32, device="cuda")


# --- One operator on a GPU ------------------------------------------------------------------------

# How often a graph uses each set of buffers.
ROUNDS_OF_A_GRAPH = 6


@dataclass
class Graph:
    """Back-to-back calls that were captured.

    Attributes:
        graph: All of them.
        calls: How many.
    """

    graph: torch.cuda.CUDAGraph
    calls: int


def l2_size() -> int:
    """Returns the size of the L2 of the current device, in bytes."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.L2_cache_size)


def count_buffers(nbytes: int, cache: int) -> int:
    """Returns how many sets of buffers are used in turn.

    Together they have eight times the size of the cache, so that a call finds nothing there. Tiny
    ones stay in the cache all the same, as they do in a program: more than 16 are not worth it.

    Args:
        nbytes: Memory that one call uses: the buffers it reads and those it writes.
        cache: Size of the L2.
    """
    return min(16, max(4, -(-8 * cache // max(1, nbytes))))


def capture(calls: Sequence[Callable[[], object]]) -> Graph:
    """Captures calls that differ in their buffers, one after the other, several times over.

    A result lives until its call comes again, so the memory of results is not reused sooner than
    that of inputs. The current stream must not be the default one, which cannot be captured, and
    what a backward pass goes back through must have been made on it.
    """
    for _ in range(2):  # Code is loaded and compiled, and tables are complete the second time.
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
    # In the first round the clocks of the card rise.
    return {name: _summarize(seconds[1:], [0.0]) for name, seconds in samples.items()}


def _time_replay(graph: Graph) -> float:
    """Returns the seconds of one of the calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.graph.replay()  # While it runs the host enqueues the replay that is timed.
    start.record()
    graph.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / graph.calls


def _summarize(samples: list[float], faults: list[float]) -> Timing:
    quarter, median, three_quarters = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (three_quarters - quarter) / median, statistics.median(faults))
