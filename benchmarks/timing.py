"""Times calls in turns, so that a slow moment of the machine falls on all of them."""

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import memory
import torch


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
        device: ``"cpu"`` or ``"cuda"``, which is timed by its events.
        give_memory_back: Whether glibc's heap gives its free memory to the system before each turn.
            Otherwise what one call frees can serve another: a large result would by chance have
            pages that are there already.
    """
    time_calls = _time_on_cuda if device == "cuda" else _time_on_cpu
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
            samples[name].append(time_calls(call, repeats[name]) / repeats[name])
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            faults[name].append((after - before) / repeats[name])
    gc.enable()
    return {name: _summarize(samples[name], faults[name]) for name in calls}


def _time_on_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def _time_on_cuda(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _summarize(samples: list[float], faults: list[float]) -> Timing:
    quarter, median, three_quarters = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (three_quarters - quarter) / median, statistics.median(faults))
