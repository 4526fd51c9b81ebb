"""Measures norm_apply on the CPU: RMSNorm and rotation in one, against both apart and a copy.

python benchmarks/bench_norm.py --quick
python benchmarks/bench_norm.py --threads 1 2 --json F.json --markdown F.md
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field

import torch
from bench_apply import OURS, Settings, copies, count, start_worker
from cases import Case
from norms import COMPILED, PEERS, UNFUSED, NormProblem, norm_apply, rotation_alone
from peers import Call, Unsupported, as_tensors, prepare_to_compile
from report import add_outputs, describe_environment, publish, table
from timing import Timing, time_in_turns
from torch import Tensor
from tqdm import tqdm

ROTATION = "apply"
PER_HEAD = "norm of each head"


@dataclass(frozen=True)
class NormCase:
    """What is timed.

    Attributes:
        case: The query and the key.
        over_heads: Whether all heads of a token share a norm.
        training: Whether the backward pass, to q, k and both weights, is timed too.
    """

    case: Case
    over_heads: bool = False
    training: bool = False

    def __str__(self) -> str:
        """Returns the name that ``--cases`` searches."""
        return f"{self.case}{', over heads' * self.over_heads}{', training' * self.training}"

    @property
    def target(self) -> tuple[str, float]:
        """The call that ours is compared with, and the multiple of it that ours may take."""
        if self.training:
            return UNFUSED, 1 / 3
        if self.over_heads:
            return PER_HEAD, 1.6
        if self.case.tokens == 1:
            return ROTATION, 1.3
        return ROTATION, 1.4 if self.case.in_cache else 1.15


def list_cases(quick: bool) -> list[NormCase]:
    """Returns all cases, or the few of a quick run, in the order of the table."""
    cases = []
    for dtype in ("bfloat16", "float32"):
        for tokens in (512,) if quick else (512, 1024, 4096):
            cases += [
                NormCase(Case(dtype, tokens=tokens), training=training)
                for training in (False, True)
            ]
        if not quick:
            cases.append(NormCase(Case(dtype, "BHSD", 1024)))
        # OLMo 2 7B: 32 heads of 128 in both.
        cases += [
            NormCase(Case(dtype, tokens=tokens, k_heads=32, variant="32 + 32 heads"), True)
            for tokens in ((512,) if quick else (512, 4096))
        ]
        cases.append(NormCase(Case(dtype, tokens=1)))
    return cases


@dataclass
class Row:
    """A case and the timings of all implementations.

    Attributes:
        threads: The number of threads.
        case: The name of the case.
        timings: Of ours, copies and peers.
        bound: The name of the call that ours is compared with.
        target: The multiple of it that ours may take.
        excluded: Peers whose result was wrong, or that failed.
    """

    threads: int
    case: str
    timings: dict[str, Timing]
    bound: str
    target: float
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def copy(self) -> float:
        """Seconds of the fastest copy."""
        return min(self.timings[name].median for name in ("copy_", "memcpy"))

    @property
    def multiple(self) -> float:
        """Our time as a multiple of the bound's."""
        return self.timings[OURS].median / self.timings[self.bound].median

    @property
    def compiled(self) -> float | None:
        """The time of the fastest compiled code as a multiple of ours."""
        seconds = [self.timings[name].median for name in COMPILED if name in self.timings]
        return min(seconds) / self.timings[OURS].median if seconds else None

    def cells(self) -> list[str]:
        """Returns the line of the table of targets."""
        ours = self.timings[OURS]
        line = [self.case, f"{ours.median * 1e3:.4f}", f"{ours.spread:.0%}"]
        line += [self.bound, f"{self.multiple:.2f}", f"{self.target:.2f}"]
        line += ["pass" if self.multiple <= self.target else "miss"]
        if self.compiled is None:
            return [*line, "", ""]
        return [*line, f"{self.compiled:.1f}", "pass" if self.compiled > 1 else "miss"]


HEADER = ["case", "ms", "spread", "bound", "x bound", "target", "", "compiled, x ours", ""]


# --- What is timed -------------------------------------------------------------------------------


def checked(problem: NormProblem, call: Call, training: bool) -> Call:
    """Checks a call, and returns what is to be timed: it, or it and its backward pass."""
    if not training:
        problem.check(as_tensors(call()), problem.results())
        return call
    gradients = (torch.randn_like(problem.q), torch.randn_like(problem.k))

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), problem.leaves, gradients)

    problem.check(train(), problem.gradients(gradients))
    return train


def list_calls(norm_case: NormCase, excluded: dict[str, str]) -> dict[str, Call]:
    """Returns ours, what it is compared with, copies and peers, all checked."""
    case, training = norm_case.case, norm_case.training
    problem = NormProblem(case, "cpu", training, norm_case.over_heads)
    calls = {OURS: checked(problem, norm_apply(problem), training), **copies(problem)}
    calls[ROTATION] = rotation_alone(problem)
    if norm_case.over_heads:
        per_head = NormProblem(case, "cpu", training)
        calls[PER_HEAD] = checked(per_head, norm_apply(per_head), training)
    prepare_to_compile()
    for name, make in PEERS.items():
        try:
            calls[name] = checked(problem, make(problem), training)
        except (ImportError, Unsupported):
            continue
        except Exception as error:
            excluded[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return calls


def measure(case: NormCase, threads: int, settings: Settings) -> Row:
    """Checks and times a case."""
    excluded: dict[str, str] = {}
    calls = list_calls(case, excluded)
    timings = time_in_turns(calls, settings.rounds, settings.seconds, "cpu")
    return Row(threads, str(case), timings, *case.target, excluded)


def run(
    cases: list[NormCase], threads: list[int], settings: Settings, show: Callable[[str], None]
) -> list[Row]:
    """Measures in processes that keep freed memory, one per number of threads, on as many CPUs."""
    all_cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with tqdm(total=len(cases) * len(threads), unit="case") as progress:
        for number in threads:
            if all_cpus:
                os.sched_setaffinity(0, all_cpus[:number])
            with ProcessPoolExecutor(
                1, spawn, initializer=start_worker, initargs=(number, True)
            ) as worker:
                for case in cases:
                    progress.set_description(f"{count(number)}, {case}")
                    rows.append(worker.submit(measure, case, number, settings).result())
                    show(" | ".join(rows[-1].cells()))
                    progress.update()
            if all_cpus:
                os.sched_setaffinity(0, all_cpus)
    return rows


# --- Reporting -----------------------------------------------------------------------------------


def report(rows: list[Row], environment: dict[str, str]) -> str:
    """Returns the whole report in Markdown."""
    parts = [
        f"# Norm and rotation: {environment['device']}, {environment['date']}",
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
        "q has 32 and k 8 heads of 128 unless noted; medians of interleaved rounds, results in "
        f"warm memory. `{ROTATION}` is the rotation alone, `{UNFUSED}` is `F.rms_norm` and then "
        "`torch_rope.apply`.",
    ]
    for threads in dict.fromkeys(row.threads for row in rows):
        group = [row for row in rows if row.threads == threads]
        names = list(dict.fromkeys(name for row in group for name in row.timings))
        names = [name for name in names if name not in ("copy_", "memcpy")]
        lines = []
        for row in group:
            timings = (row.timings.get(name) for name in names)
            cells = ["" if one is None else f"{one.median / row.copy:.2f}" for one in timings]
            lines.append([row.case, f"{row.copy * 1e3:.4f}", *cells])
        parts += [
            f"## {count(threads)}",
            table(HEADER, [row.cells() for row in group]),
            "As multiples of the best copy of q and k:",
            table(["case", "copy, ms", *names], lines),
        ]
    excluded = [
        f"- {count(row.threads)}, {row.case}: {name}: {why}"
        for row in rows
        for name, why in row.excluded.items()
    ]
    if excluded:
        heading = "## Left out, since they fail or are inexact"
        parts.append("\n".join([heading, "", *excluded]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", help="1 2 by default, or 1 when quick")
    parser.add_argument("--cases", default="", help="only cases whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: two minutes")
    add_outputs(parser)
    arguments = parser.parse_args()
    settings = Settings(*((3, 0.01) if arguments.quick else (9, 0.03)))
    cases = [case for case in list_cases(arguments.quick) if arguments.cases in str(case)]
    if not cases:
        raise SystemExit(f"no case has {arguments.cases!r} in its name")

    threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    rows = run(cases, threads, settings, tqdm.write)
    environment = {**describe_environment("cpu"), "rounds": str(settings.rounds)}
    text = report(rows, environment)
    publish(text, {"environment": environment, "rows": [asdict(row) for row in rows]}, arguments)


if __name__ == "__main__":
    main()
