"""Measures launches and host time for the tokens of one decoding step.

python benchmarks/bench_decode.py
python benchmarks/bench_decode.py --batch 1 64 --json F.json --markdown F.md
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from cases import Case, Problem, torch_rope_call
from peers import PEERS, Call, Unsupported
from report import add_outputs, describe_environment, publish, table
from timing import time_in_turns
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

OURS = "torch-rope"
OURS_IN_PLACE = "torch-rope, in place"
NORM = "layer_norm of q"  # the host cost of one PyTorch kernel
EMPTY = "two empty_like"  # the additional cost of a functional call's outputs
COPY = "copy_ of q and k"


@dataclass
class Figures:
    """The figures of one call; None without a GPU.

    Attributes:
        launches: Kernels and copies on the device.
        kernels: Seconds in them alone, as the profiler sees them, without what is between them.
        host: Seconds on the CPU.
    """

    launches: float | None
    kernels: float | None
    host: float


def list_calls(problem: Problem) -> dict[str, Call]:
    """Returns ours, the references, and the peers that support the case."""
    q, k = problem.q, problem.k
    copies = [(x, torch.empty_like(x)) for x in (q, k)]
    in_place = Problem(problem.case, q.device.type)  # In place: needs its own tensors.
    calls: dict[str, Call] = {
        OURS: torch_rope_call(problem),
        OURS_IN_PLACE: torch_rope_call(in_place, in_place=True),
        NORM: lambda: functional.layer_norm(q, q.shape[-1:]),
        EMPTY: lambda: (torch.empty_like(q), torch.empty_like(k)),
        COPY: lambda: [y.copy_(x) for x, y in copies],
    }
    for name, make in PEERS.items():
        try:
            call = make(problem)
            call()
        except (ImportError, Unsupported):
            continue
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {error}".splitlines()[0])
            continue
        calls[name] = call
    return calls


def profile_kernels(call: Callable[[], object], times: int = 100) -> tuple[float, float]:
    """Returns the launches per call, and the median of their total kernel seconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    durations = [event.time_range.elapsed_us() / 1e6 for event in events]
    launches, rest = divmod(len(durations), times)
    if rest != 0:  # Calls differ.
        return len(durations) / times, sum(durations) / times
    calls = [durations[i : i + launches] for i in range(0, len(durations), max(1, launches))]
    return launches, statistics.median(map(sum, calls)) if calls else 0.0


def measure(batch: int, device: str, rounds: int) -> dict[str, Figures]:
    """Measures all calls for a batch size."""
    problem = Problem(Case("bfloat16", tokens=1, batch=batch, variant="decode"), device)
    calls = list_calls(problem)
    host = time_in_turns(calls, rounds, 0.005, "host" if device == "cuda" else device)
    figures = {}
    for name, call in calls.items():
        launches, kernels = profile_kernels(call) if device == "cuda" else (None, None)
        figures[name] = Figures(launches, kernels, host[name].median)
    return figures


def verdicts(name: str, figures: dict[str, Figures]) -> str:
    """Returns which targets ours meets."""
    if name not in (OURS, OURS_IN_PLACE):
        return ""
    ours, most = figures[name], figures[NORM].host
    if name == OURS:
        most += figures[EMPTY].host
    met = {"host": ours.host <= most}
    if ours.launches is not None:
        met["one launch"] = ours.launches == 1
    return ", ".join(f"{what}: {'pass' if is_met else 'miss'}" for what, is_met in met.items())


def microseconds(seconds: float | None) -> str:
    """Returns a table's cell."""
    return "" if seconds is None else f"{seconds * 1e6:.2f}"


def report(by_batch: dict[int, dict[str, Figures]], environment: dict[str, str]) -> str:
    """Returns the whole report in Markdown."""
    parts = [
        f"# Decoding: {environment['device']}, {environment['date']}",
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
        "q: 32 heads, k: 8 heads of 128, bfloat16, one token per sequence. Targets: q and k in one "
        "launch; host time in place at most that of layer_norm, otherwise two empty_like more.",
    ]
    header = ["call", "launches", "kernels, us", "host, us", "targets"]
    for batch, figures in by_batch.items():
        lines = []
        for name, one in figures.items():
            launches = "" if one.launches is None else f"{one.launches:g}"
            cells = [microseconds(value) for value in (one.kernels, one.host)]
            lines.append([name, launches, *cells, verdicts(name, figures)])
        parts += [f"## {batch} sequence{'s' if batch > 1 else ''}", table(header, lines)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=default, help="cpu: the host's side alone"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="sequences")
    parser.add_argument("--rounds", type=int, default=7, help="of all calls in turn, on the host")
    add_outputs(parser)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    by_batch = {
        batch: measure(batch, arguments.device, arguments.rounds) for batch in arguments.batch
    }
    environment = describe_environment(arguments.device)
    text = report(by_batch, environment)
    calls = {
        batch: {name: asdict(one) for name, one in figures.items()}
        for batch, figures in by_batch.items()
    }
    publish(text, {"environment": environment, "sequences": calls}, arguments)


if __name__ == "__main__":
    main()
