"""Measures torch-rope on the CPU against copies of the same bytes and against its peers.

python benchmarks/bench_apply.py --quick
python benchmarks/bench_apply.py --threads 1 2 --json F.json --markdown F.md --chart F.png
"""

import argparse
import ctypes
import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import memory
import torch
from cases import Case, Problem, list_cases, torch_rope_call
from peers import ALWAYS_INTERLEAVED, PEERS, Call, Unsupported, as_tensors
from report import add_outputs, describe_environment, offers_huge_pages, publish, table
from timing import Timing, time_in_turns
from torch import Tensor
from tqdm import tqdm

OURS = "torch-rope"
COPIES = ("copy_", "memcpy")
HALF_SPLIT = "half-split D 128"
TWICE = "2 functional calls"

# "resident" runs in a process that keeps freed memory; the others do not.
FORMS = ("resident", "functional", "in place", "training")

Calls = dict[str, Call]


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    rounds: int
    seconds: float  # per call and round


@dataclass
class Row:
    """One case in one form: the timings of all implementations, and how ours compares."""

    threads: int
    form: str
    case: str
    timings: dict[str, Timing]
    ceiling: str  # the bound that the target is a multiple of
    multiple: float
    target: float | None
    excluded: dict[str, str]  # peers whose result was wrong, or that failed

    @property
    def copy(self) -> float:
        """Seconds of the fastest copy."""
        return min(self.timings[name].median for name in COPIES if name in self.timings)

    @property
    def multiples_of_copy(self) -> dict[str, float]:
        """The time of each implementation, divided by that of the fastest copy."""
        timings = self.timings.items()
        return {name: t.median / self.copy for name, t in timings if name not in COPIES}

    @property
    def peers(self) -> dict[str, float]:
        """Seconds of each peer."""
        return {name: self.timings[name].median for name in PEERS if name in self.timings}

    @property
    def verdict(self) -> str:
        """Whether the target is met."""
        if self.target is None:
            return ""
        return "pass" if self.multiple <= self.target else "miss"


# --- What is timed -------------------------------------------------------------------------------


def copies(problem: Problem) -> Calls:
    """Returns the bounds: copies of q and k into warm buffers."""
    sources = (problem.q.detach(), problem.k.detach())
    targets = tuple(torch.zeros_like(x) for x in sources)
    both = list(zip(sources, targets, strict=True))
    calls: Calls = {"copy_": lambda: [y.copy_(x) for x, y in both]}
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    addresses = [(y.data_ptr(), x.data_ptr(), x.nbytes) for x, y in both]  # copy_ keeps both alive.
    calls["memcpy"] = lambda: [memcpy(*copy) for copy in addresses]
    return calls


def peer_calls(
    problem: Problem, prepare: Callable[[str, Call], Call], excluded: dict[str, str]
) -> Calls:
    """Returns the peers that can be imported and support the case.

    Args:
        problem: The tensors to rotate.
        prepare: Checks a named peer's call, and returns the call to time.
        excluded: Receives the peers that fail, with the reasons.
    """
    calls: Calls = {}
    for name, make in PEERS.items():
        try:
            calls[name] = prepare(name, make(problem))
        except (ImportError, Unsupported):
            continue
        except Exception as error:
            excluded[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return calls


def forward_calls(problem: Problem, form: str, excluded: dict[str, str]) -> Calls:
    """Returns ours, the bounds and the peers for an out-of-place call, all checked."""
    case, q, k = problem.case, problem.q, problem.k

    @functools.cache
    def exact(interleaved: bool) -> tuple[Tensor, ...]:
        return problem.rotate_exactly((q, k), interleaved)

    def check(name: str, call: Call) -> Call:
        if name == "ONNX Runtime" and form == "functional":
            raise Unsupported  # Its output is bound: it allocates nothing.
        interleaved = case.interleaved or name in ALWAYS_INTERLEAVED
        problem.check(as_tensors(call()), exact(interleaved))
        return call

    calls: Calls = {OURS: check(OURS, torch_rope_call(problem)), **copies(problem)}
    if form == "functional":
        calls["clone"] = lambda: (q.clone(), k.clone())
    if case.is_variant:
        calls[HALF_SPLIT] = torch_rope_call(Problem(Case(case.dtype), "cpu"))
    return calls | peer_calls(problem, check, excluded)


def in_place_calls(problem: Problem) -> Calls:
    """Returns ours in place, and the fastest operator that reads and writes each element.

    That is neg_, which flips a bit. mul_ and add_ would convert bfloat16 to float32 and back, which
    takes longer than moving it.
    """
    q, k = problem.q.clone(), problem.k.clone()
    exact = problem.rotate_exactly((q, k), problem.case.interleaved)
    ours = torch_rope_call(problem, in_place=True)
    problem.check(ours(), exact)
    return {OURS: ours, "neg_": lambda: (q.neg_(), k.neg_()), **copies(problem)}


def training_calls(problem: Problem, excluded: dict[str, str]) -> Calls:
    """Returns forward and backward of ours and of the PyTorch peers, and two functional calls."""
    case, inputs = problem.case, (problem.q, problem.k)
    gradients = (torch.randn_like(problem.q), torch.randn_like(problem.k))
    once = torch_rope_call(Problem(case, "cpu"))

    @functools.cache
    def exact(interleaved: bool) -> tuple[Tensor, ...]:
        return problem.rotate_exactly(gradients, interleaved, conjugate=True)

    def train_and_check(name: str, rotate: Call) -> Call:
        def train() -> tuple[Tensor, ...]:
            return torch.autograd.grad(rotate(), inputs, gradients)

        problem.check(as_tensors(train()), exact(case.interleaved or name in ALWAYS_INTERLEAVED))
        return train

    ours = train_and_check(OURS, torch_rope_call(problem))
    calls: Calls = {OURS: ours, TWICE: lambda: (once(), once()), **copies(problem)}
    return calls | peer_calls(problem, train_and_check, excluded)


# --- Targets -------------------------------------------------------------------------------------


def target(case: Case, form: str) -> tuple[str, float | None]:
    """Returns the bound of a case, and the multiple of it that ours may take."""
    sixteen_bits_in_cache = case.dtype != "float32" and case.in_cache
    if form == "training":
        return TWICE, 1.1
    if form == "in place":
        return "neg_", 1.6 if sixteen_bits_in_cache else 1.1
    if case.is_variant:
        return HALF_SPLIT, 1.3
    if form == "functional":
        if case.tokens >= 4096:
            return "clone", 0.5 if offers_huge_pages() else 1.05
        return "clone", 1.6 if sixteen_bits_in_cache else 1.15
    if sixteen_bits_in_cache:
        return "copy", 1.5
    return "copy", 1.1 if case.tokens >= 512 else None


# --- Running -------------------------------------------------------------------------------------


def count(threads: int) -> str:
    """Returns how many threads, in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def time_with_fresh_outputs(calls: dict[str, Call], settings: Settings) -> dict[str, Timing]:
    """Times calls that allocate their outputs.

    Whether glibc's heap returns an output's memory to the system is chance, decided by what lies
    behind it. If one of ours and ``clone`` then gets new pages in each call and the other does not,
    their ratio says nothing: they are timed again, up to three times.
    """
    for _ in range(3):
        timings = time_in_turns(
            calls, settings.rounds, settings.seconds, "cpu", give_memory_back=True
        )
        compared = [timings[name].page_faults > 8 for name in (OURS, "clone") if name in timings]
        if len(set(compared)) < 2:
            break
    return timings


def measure(case: Case, form: str, threads: int, settings: Settings) -> Row:
    """Checks and times one case in one form."""
    excluded: dict[str, str] = {}
    if form != "resident":
        memory.take_from_heap(128 * 1024)  # Setup leaves no holes that results could fill.
    problem = Problem(case, "cpu", requires_grad=form == "training")
    if form == "training":
        calls = training_calls(problem, excluded)
    elif form == "in place":
        calls = in_place_calls(problem)
    else:
        calls = forward_calls(problem, form, excluded)

    if form == "resident":
        timings = time_in_turns(calls, settings.rounds, settings.seconds, "cpu")
    else:
        # Memory freed by large peers leaves holes in the heap, so they run afterwards.
        memory.take_from_heap(32 * 1024 * 1024)  # As glibc does after a while.
        peers = {name: calls.pop(name) for name in PEERS if name in calls}
        timings = {}
        for group in (calls, peers):
            timings |= time_with_fresh_outputs(group, settings)
    ceiling, multiple_of_ceiling = target(case, form)
    row = Row(threads, form, str(case), timings, ceiling, 0.0, multiple_of_ceiling, excluded)
    seconds = row.copy if ceiling == "copy" else timings[ceiling].median
    if ceiling == HALF_SPLIT:
        seconds *= problem.nbytes / Problem(Case(case.dtype), "meta").nbytes
    row.multiple = timings[OURS].median / seconds
    return row


def start_worker(threads: int, keep_memory: bool) -> None:
    """Initialises a measuring process."""
    torch.set_num_threads(threads)
    if keep_memory:
        memory.keep_freed_memory()


def forms_of(case: Case) -> list[str]:
    """Returns the forms to measure a case in."""
    if case.is_variant:
        return ["resident"]
    left_out = set() if case == Case("bfloat16", tokens=4096) else {"training"}
    return [form for form in FORMS if form not in left_out]


def run(cases: list[Case], threads: list[int], settings: Settings) -> list[Row]:
    """Measures in separate processes, one per number of threads and kind of memory.

    Each is limited to as many CPUs as threads, which also limits libraries that count CPUs.
    """
    all_cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    spawn = multiprocessing.get_context("spawn")
    work = [(case, form) for case in cases for form in forms_of(case)]
    rows = []
    with tqdm(total=len(work) * len(threads), unit="case") as progress:
        for number in threads:
            for keep_memory in (False, True):
                if all_cpus:
                    os.sched_setaffinity(0, all_cpus[:number])
                with ProcessPoolExecutor(
                    1, spawn, initializer=start_worker, initargs=(number, keep_memory)
                ) as worker:
                    for case, form in work:
                        if (form == "resident") == keep_memory:
                            progress.set_description(f"{count(number)}, {form}, {case}")
                            future = worker.submit(measure, case, form, number, settings)
                            rows.append(future.result())
                            progress.update()
                if all_cpus:
                    os.sched_setaffinity(0, all_cpus)
    return sorted(rows, key=lambda row: (row.threads, FORMS.index(row.form)))


# --- Reporting -----------------------------------------------------------------------------------


def target_table(rows: list[Row]) -> str:
    """Returns a table of ours against bounds, targets and the fastest peer."""
    header = ["case", "ms", "spread", "ceiling", "x ceiling", "target", "", "x copy"]
    header += ["quickest peer", "x ours", "page faults, ours / ceiling"]
    lines = []
    for row in rows:
        ours = row.timings[OURS]
        line = [row.case, f"{ours.median * 1e3:.4f}", f"{ours.spread:.0%}", row.ceiling]
        line += [f"{row.multiple:.2f}", f"{row.target:.3g}" if row.target else "", row.verdict]
        line += [f"{ours.median / row.copy:.2f}"]
        if row.peers:
            name = min(row.peers, key=row.peers.__getitem__)
            line += [name, f"{row.peers[name] / ours.median:.1f}"]
        else:
            line += ["", ""]
        faults = f"{ours.page_faults:.0f}"
        if row.ceiling in row.timings:
            faults += f" / {row.timings[row.ceiling].page_faults:.0f}"
        lines.append([*line, faults])
    return table(header, lines)


def peer_table(rows: list[Row]) -> str:
    """Returns a table of all implementations as multiples of a copy."""
    names = dict.fromkeys(name for row in rows for name in row.multiples_of_copy)
    lines = []
    for row in rows:
        multiples = row.multiples_of_copy
        cells = [f"{multiples[name]:.2f}" if name in multiples else "" for name in names]
        lines.append([row.case, f"{row.copy * 1e3:.4f}", *cells])
    return table(["case", "copy, ms", *names], lines)


def thread_table(rows: list[Row]) -> str:
    """Returns a table of the speed-ups of ours and of a copy with two threads."""
    one, two = ({(r.form, r.case): r for r in rows if r.threads == n} for n in (1, 2))
    lines = []
    for key in one.keys() & two.keys():
        ours = one[key].timings[OURS].median / two[key].timings[OURS].median
        copy = one[key].timings["copy_"].median / two[key].timings["copy_"].median
        verdict = ("pass" if ours >= 1.7 else "miss") if copy >= 1.7 else ""
        lines.append([*key, f"{ours:.2f}", f"{copy:.2f}", verdict])
    order = {(row.form, row.case): i for i, row in enumerate(rows)}
    lines.sort(key=lambda line: order[line[0], line[1]])
    return table(["form", "case", OURS, "copy_", "target 1.7 where a copy gains it"], lines)


def report(rows: list[Row], environment: dict[str, str]) -> str:
    """Returns the whole report in Markdown."""
    parts = [f"# {environment['device']}, {environment['date']}"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in environment.items()))
    groups = dict.fromkeys((row.threads, row.form) for row in rows)
    for threads, form in groups:
        group = [row for row in rows if (row.threads, row.form) == (threads, form)]
        parts.append(f"## {form}, {count(threads)}")
        parts.append(target_table(group))
        parts.append("As multiples of the best copy:")
        parts.append(peer_table(group))
    if {1, 2} <= {row.threads for row in rows}:
        parts += ["## What two threads gain over one", thread_table(rows)]

    slower = [
        f"- {count(row.threads)}, {row.form}, {row.case}: {name}"
        for row in rows
        for name, seconds in row.peers.items()
        if seconds < row.timings[OURS].median
    ]
    targets = [row for row in rows if row.target is not None]
    met = sum(row.verdict == "pass" for row in targets)
    parts += ["## Summary", f"Targets met: {met} of {len(targets)}."]
    parts.append(
        "\n".join(["Peers that are faster:", "", *slower]) if slower else "No peer is faster."
    )
    excluded = dict.fromkeys(
        f"- {row.form}, {row.case}: {name}: {why}"
        for row in rows
        for name, why in row.excluded.items()
    )
    if excluded:
        parts.append("\n".join(["Left out, since they fail or are inexact:", "", *excluded]))
    return "\n\n".join(parts) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Draws up to four functional cases with the fewest threads, as multiples of a copy."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    threads = min(row.threads for row in rows)
    rows = [row for row in rows if (row.threads, row.form) == (threads, "functional")]
    shown = [
        f"{dtype} BSHD {tokens}" for dtype in ("float32", "bfloat16") for tokens in (512, 4096)
    ]
    rows = [row for row in rows if row.case in shown] or rows[:4]
    if not rows:
        raise SystemExit("--chart draws functional calls, but no case chosen has that form")

    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 3.2 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(rows) :]:
        axis.remove()
    for row, axis in zip(rows, axes.flat, strict=False):
        multiples = row.multiples_of_copy
        names = sorted(multiples, key=multiples.__getitem__, reverse=True)
        colors = ["#d9480f" if name == OURS else "#adb5bd" for name in names]
        bars = axis.barh(names, [multiples[name] for name in names], color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(0.5, 2.0 * max(multiples.values()))
        axis.set_title(f"{row.case} tokens", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"time for q and k, as a multiple of that of a copy; {count(threads)}")
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", help="1 2 by default, or 1 when quick")
    parser.add_argument("--cases", default="", help="only cases whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: a minute")
    parser.add_argument("--device", choices=("cpu",), help="bench_cuda.py measures a GPU")
    add_outputs(parser)
    parser.add_argument("--chart", type=Path, help="draw multiples of copy here")
    return parser.parse_args()


def main() -> None:
    """Measures and reports."""
    arguments = parse_arguments()
    settings = Settings(*((3, 0.01) if arguments.quick else (7, 0.02)))
    cases = [case for case in list_cases(arguments.quick) if arguments.cases in str(case)]
    if not cases:
        raise SystemExit(f"no case has {arguments.cases!r} in its name")

    threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    rows = run(cases, threads, settings)
    environment = {**describe_environment("cpu"), "rounds": str(settings.rounds)}
    text = report(rows, environment)
    publish(text, {"environment": environment, "rows": [asdict(row) for row in rows]}, arguments)
    if arguments.chart:
        draw(rows, arguments.chart)


if __name__ == "__main__":
    main()
