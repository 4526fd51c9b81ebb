"""Measures torch-rope on a GPU, as fractions of a copy's speed, against targets and its peers.

python benchmarks/bench_cuda.py
python benchmarks/bench_cuda.py --cases "BSHD 4096$" --without-peers --json F.json --markdown F.md
"""

import argparse
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import norms
import torch
from cases import Case, Problem, torch_rope_call
from norms import NormProblem
from peers import ALWAYS_INTERLEAVED, PEERS, Call, Unsupported, as_tensors, prepare_to_compile
from report import add_outputs, describe_environment, publish, table
from timing import Graph, Timing, capture, count_buffers, l2_size, time_graphs
from torch import Tensor

OURS = "torch-rope"
COPY, COPY_KERNEL = "copy_", "bitwise_not"
NOT_CAPTURED = ("JAX",)  # It has its own streams.

PLAIN = Case("bfloat16", tokens=4096)
PARTIAL = replace(PLAIN, rotary_dim=64, variant="partial 64 of 128")
HEADS_OF_64 = replace(PLAIN, tokens=8192, head_dim=64)


@dataclass(frozen=True)
class Target:
    """The target of a case.

    Attributes:
        case: The case.
        fraction: Of the speed of the best copy of what must be moved.
        form: ``"functional"``, ``"in place"`` or ``"backward"``: of q and k alone; or ``"norm"``,
            the norm and the rotation, or ``"norm, backward"``: of q, k and both weights.
    """

    case: Case
    fraction: float
    form: str = "functional"

    def __str__(self) -> str:
        """Returns the name that ``--cases`` searches."""
        return str(self.case) if self.form == "functional" else f"{self.case}, {self.form}"

    @property
    def copied_share(self) -> float:
        """The bytes that must be moved, as a multiple of those of a copy of q and k.

        In place only the rotated part is. Backward, the norm reads q and k too: three passes over
        memory instead of the two of a copy.
        """
        if self.form == "in place":
            return self.case.rotated / self.case.head_dim
        return 1.5 if self.form == "norm, backward" else 1.0

    def problem(self, device: str) -> Problem:
        """Returns random tensors for the case."""
        make = NormProblem if self.form.startswith("norm") else Problem
        return make(self.case, device, self.form.endswith("backward"))


TARGETS = (
    Target(PLAIN, 0.96),
    Target(replace(PLAIN, tokens=16384), 0.97),
    Target(replace(PLAIN, tokens=2048, batch=8), 0.96),
    Target(PLAIN, 0.95, "in place"),
    Target(replace(PLAIN, layout="BHSD"), 0.94),
    Target(replace(PLAIN, interleaved=True, variant="interleaved"), 0.95),
    Target(replace(PLAIN, tokens=1024), 0.95),
    Target(replace(PLAIN, tokens=256), 0.93),
    Target(replace(PLAIN, tokens=1, batch=64), 1 / 1.35),
    Target(replace(PLAIN, tokens=1), 1 / 1.15),
    Target(replace(HEADS_OF_64, variant="D 64"), 0.95),
    Target(replace(PLAIN, head_dim=80, variant="D 80"), 0.95),
    Target(replace(PLAIN, head_dim=96, variant="D 96"), 0.95),
    Target(replace(PLAIN, head_dim=256, variant="D 256"), 0.95),
    Target(
        replace(HEADS_OF_64, tokens=65536, q_heads=1, k_heads=0, variant="one head of 64"), 0.86
    ),
    Target(replace(PLAIN, tokens=16384, q_heads=4, k_heads=1, variant="4 + 1 heads"), 0.92),
    Target(replace(PLAIN, dtype="float32"), 0.96),
    Target(replace(PLAIN, dtype="float16"), 0.96),
    Target(replace(PLAIN, angles="inv_freq", variant="inv_freq (N)"), 0.93),
    Target(replace(PLAIN, angles="axes", variant="inv_freq (3, N)"), 0.93),
    Target(replace(PLAIN, angles="tables", variant="tables"), 0.93),
    Target(replace(PLAIN, angles="full tables", variant="full-width tables"), 0.93),
    Target(replace(PLAIN, angles="rows", variant="tables by position"), 0.93),
    Target(replace(PLAIN, positions="int32", variant="int32 positions"), 0.93),
    Target(PARTIAL, 0.93),
    Target(PARTIAL, 0.85, "in place"),
    Target(PLAIN, 0.96, "backward"),
    Target(PLAIN, 0.90, "norm"),
    Target(replace(PLAIN, tokens=16384), 0.94, "norm"),
    Target(PLAIN, 0.85, "norm, backward"),
    Target(replace(PLAIN, layout="BDS", tokens=131072, k_heads=0, variant="embedding axis 1"), 0.5),
    Target(replace(HEADS_OF_64, storage_offset=1, variant="D 64, odd offset"), 0.5),
)


@dataclass
class Row:
    """A case and the timings of all implementations.

    Attributes:
        name: Of the target.
        target: The fraction of the copy's speed that is promised.
        timings: Of the copies, ours and the peers.
        excluded: Peers whose result was wrong, or that failed or could not be captured.
    """

    name: str
    target: float
    timings: dict[str, Timing]
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def copy(self) -> float:
        """Seconds of the fastest copy."""
        return min(self.timings[name].median for name in (COPY, COPY_KERNEL))

    @property
    def fractions(self) -> dict[str, float]:
        """The speed of ours and the peers, as fractions of the fastest copy's."""
        timings = self.timings.items()
        return {
            name: self.copy / t.median for name, t in timings if name not in (COPY, COPY_KERNEL)
        }

    def cells(self) -> list[str]:
        """Returns the line of a table."""
        ours, fractions = self.timings[OURS], self.fractions
        line = [self.name, f"{self.copy * 1e6:.2f}", f"{ours.median * 1e6:.2f}"]
        line += [f"{ours.spread:.0%}", f"{fractions[OURS]:.3f}", f"{self.target:.2f}"]
        line += ["pass" if fractions[OURS] >= self.target else "miss"]
        peers = {name: fraction for name, fraction in fractions.items() if name != OURS}
        best = max(peers, key=peers.__getitem__, default=None)
        return [*line, f"{best} {peers[best]:.3f}" if best else ""]


HEADER = ["case", "copy, us", "ours, us", "spread", "of the copy", "target", "", "best peer"]


# --- What is timed, on several sets of buffers ----------------------------------------------------


def copies(nbytes: int) -> dict[str, Call]:
    """Returns copies of this size: cudaMemcpyAsync, and a kernel that flips every bit."""
    source, target = torch.zeros(2, nbytes, dtype=torch.uint8, device="cuda")
    words, flipped = source.view(torch.int32), target.view(torch.int32)
    return {
        COPY: lambda: target.copy_(source),
        COPY_KERNEL: lambda: torch.bitwise_not(words, out=flipped),
    }


def ours(problem: Problem, form: str) -> Call:
    """Returns torch-rope's call, after checking its result."""
    if isinstance(problem, NormProblem):
        return of_norm(problem, norms.norm_apply(problem), form)
    interleaved = problem.case.interleaved
    if form == "backward":
        rotated = tuple_of(torch_rope_call(problem)())
        gradients = tuple(torch.randn_like(x) for x in rotated)
        exact = problem.rotate_exactly(gradients, interleaved, conjugate=True)
        call: Call = lambda: torch.autograd.grad(  # noqa: E731
            rotated, problem.tensors, gradients, retain_graph=True
        )
    else:
        exact = problem.rotate_exactly(problem.tensors, interleaved)
        call = torch_rope_call(problem, in_place=form == "in place")
    problem.check(tuple_of(call()), exact)
    return call


def of_norm(problem: NormProblem, forward: Call, form: str) -> Call:
    """Returns a call of ``norms.py``, or its backward pass alone, after checking its result."""
    if form == "norm":
        problem.check(as_tensors(forward()), problem.results())
        return forward
    rotated = as_tensors(forward())
    gradients = (torch.randn_like(problem.q), torch.randn_like(problem.k))

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(rotated, problem.leaves, gradients, retain_graph=True)

    problem.check(backward(), problem.gradients(gradients))
    return backward


def tuple_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns a pair as it is, and wraps a single tensor in a tuple."""
    return (result,) if isinstance(result, Tensor) else result


def peer_calls(
    problems: Sequence[Problem], form: str
) -> Iterator[tuple[str, Callable[[], list[Call]]]]:
    """Lists the peers; each is made and checked when its function is called.

    Args:
        problems: The tensors to rotate, one problem per set of buffers.
        form: Of the target.
    """
    first = problems[0]
    if isinstance(first, NormProblem):
        prepare_to_compile()
        for name, make_norm in norms.PEERS.items():
            yield (
                name,
                lambda make=make_norm: [of_norm(each, make(each), form) for each in problems],
            )
        return

    def checked(name: str, make: Callable[[Problem], Call]) -> list[Call]:
        calls = [make(problem) for problem in problems]
        interleaved = first.case.interleaved or name in ALWAYS_INTERLEAVED
        first.check(as_tensors(calls[0]()), first.rotate_exactly(first.tensors, interleaved))
        return calls

    for name, make in PEERS.items():
        if name not in NOT_CAPTURED and first.case.k_heads and first.case.layout != "BDS":
            yield name, functools.partial(checked, name, make)


def peer_graphs(
    problems: Sequence[Problem], form: str, excluded: dict[str, str]
) -> dict[str, Graph]:
    """Captures the peers that can be imported and support the case, after checking them.

    Args:
        problems: The tensors to rotate, one problem per set of buffers.
        form: Of the target.
        excluded: Receives the peers that fail, and why.
    """
    graphs = {}
    for name, make in peer_calls(problems, form):
        try:
            graphs[name] = capture(make())
        except (ImportError, Unsupported):
            continue
        except Exception as error:
            excluded[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return graphs


def measure(target: Target, rounds: int, with_peers: bool) -> Row:
    """Captures and times ours, the copies and the peers."""
    form = target.form
    nbytes = sum(x.nbytes for x in Problem(target.case, "meta").tensors)
    count = count_buffers(nbytes if form == "in place" else 2 * nbytes, l2_size())
    problems = [target.problem("cuda") for _ in range(count)]
    graphs = {OURS: capture([ours(problem, form) for problem in problems])}

    copied = int(target.copied_share * nbytes)
    buffers = [copies(copied) for _ in range(count_buffers(2 * copied, l2_size()))]
    for name in (COPY, COPY_KERNEL):
        graphs[name] = capture([copy[name] for copy in buffers])

    excluded: dict[str, str] = {}
    if with_peers and form in ("functional", "norm", "norm, backward"):
        graphs |= peer_graphs(problems, form, excluded)
    return Row(str(target), target.fraction, time_graphs(graphs, rounds), excluded)


# --- Reporting -----------------------------------------------------------------------------------


def report(rows: list[Row], environment: dict[str, str]) -> str:
    """Returns the whole report in Markdown."""
    parts = [
        f"# {environment['device']}, {environment['date']}",
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
        "q has 32 and k 8 heads of 128 unless noted. Graphs of back-to-back calls over buffers "
        "that exceed the L2; speeds as fractions of the fastest copy of the same bytes, medians "
        "over replays.",
        table(HEADER, [row.cells() for row in rows]),
    ]
    names = list(dict.fromkeys(name for row in rows for name in row.fractions))
    if len(names) > 1:
        lines = [
            [row.name, *(f"{row.fractions[n]:.3f}" if n in row.fractions else "" for n in names)]
            for row in rows
            if len(row.fractions) > 1
        ]
        parts += ["Of the copy's speed:", table(["case", *names], lines)]
    met = sum(row.fractions[OURS] >= row.target for row in rows)
    parts.append(f"Targets met: {met} of {len(rows)}.")
    excluded = [
        f"- {row.name}: {name}: {why}" for row in rows for name, why in row.excluded.items()
    ]
    if excluded:
        heading = "Left out, since they fail, are inexact or cannot be captured:"
        parts.append("\n".join([heading, "", *excluded]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measures and reports; prints each case immediately."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="only cases whose name has this expression")
    parser.add_argument("--rounds", type=int, default=11, help="replays of every graph")
    parser.add_argument("--without-peers", action="store_true", help="only ours and the copies")
    add_outputs(parser)
    arguments = parser.parse_args()
    targets = [target for target in TARGETS if re.search(arguments.cases, str(target))]
    if not targets:
        raise SystemExit(f"no case has {arguments.cases!r} in its name")

    rows, failures = [], []
    with torch.cuda.stream(torch.cuda.Stream()):
        for target in targets:
            try:
                row = measure(target, arguments.rounds, not arguments.without_peers)
            except Exception as error:
                failures.append(f"{target}: {type(error).__name__}: {error}"[:500])
                print(failures[-1], flush=True)
            else:
                rows.append(row)
                print(" | ".join(row.cells()), flush=True)
            torch.cuda.empty_cache()

    environment = {**describe_environment("cuda"), "rounds": str(arguments.rounds)}
    figures: dict[str, object] = {
        "environment": environment,
        "rows": [asdict(row) | {"fractions": row.fractions} for row in rows],
    }
    publish(report(rows, environment), figures, arguments)
    if failures:
        raise SystemExit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
