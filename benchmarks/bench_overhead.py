"""Measures call overhead on tiny tensors.

python benchmarks/bench_overhead.py
python benchmarks/bench_overhead.py --json F.json --markdown F.md
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch_rope
from cases import Case, Problem, torch_rope_call
from peers import PEERS, Call, Unsupported
from report import add_outputs, describe_environment, publish, table
from timing import time_in_turns
from torch import Tensor
from torch.nn import functional

# One token: 4 query heads and 2 key heads of 64 elements.
CASE = Case("float32", tokens=1, q_heads=4, k_heads=2, head_dim=64)

UNIT = "torch.add"
TARGETS = {"torch_rope.apply(x)": 2.0, "torch_rope.apply((q, k))": 3.0}


def calls_without_grad(problem: Problem) -> dict[str, Call]:
    """Returns ours, two PyTorch operators, and the peers, which rotate q and k."""
    x, positions = problem.q, problem.positions
    written = (x.clone(), problem.k.clone())
    calls: dict[str, Call] = {
        UNIT: lambda: torch.add(x, x),
        "layer_norm": lambda: functional.layer_norm(x, (CASE.head_dim,)),
        "torch_rope.apply(x)": lambda: torch_rope.apply(x, positions),
        "torch_rope.apply((q, k))": lambda: torch_rope.apply((problem.q, problem.k), positions),
        "torch_rope.apply_(x)": lambda: torch_rope.apply_(written[0], positions),
        "torch_rope.apply_((q, k))": lambda: torch_rope.apply_(written, positions),
        "torch.ops.rope.apply(x)": lambda: torch.ops.rope.apply(x, positions),
    }
    for name, make in PEERS.items():
        try:
            calls[name] = make(problem)
        except (ImportError, Unsupported):
            continue
    return calls


def calls_with_grad(problem: Problem) -> dict[str, Call]:
    """Returns calls that record an autograd graph, with and without the backward pass."""
    q, k = problem.q, problem.k
    ones = (torch.ones_like(q), torch.ones_like(k))
    forward: dict[str, Callable[[], Tensor]] = {
        UNIT: lambda: torch.add(q, q),
        "layer_norm": lambda: functional.layer_norm(q, (CASE.head_dim,)),
        "torch_rope.apply(x)": lambda: torch_rope.apply(q, problem.positions),
    }
    of_pair = {
        "torch_rope.apply((q, k))": torch_rope_call(problem),
        "eager PyTorch": PEERS["eager PyTorch"](problem),
    }
    calls: dict[str, Call] = {
        f"{name}, grad": call for name, call in {**forward, **of_pair}.items()
    }
    for name, call in forward.items():
        calls[f"{name}, grad, backward"] = lambda call=call: torch.autograd.grad(call(), q, ones[0])
    for name, call in of_pair.items():
        calls[f"{name}, grad, backward"] = lambda call=call: torch.autograd.grad(
            call(), (q, k), ones
        )
    return calls


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="of all calls in turn")
    add_outputs(parser)
    arguments = parser.parse_args()
    device: str = arguments.device

    torch.set_num_threads(1)
    calls = calls_without_grad(Problem(CASE, device))
    calls |= calls_with_grad(Problem(CASE, device, requires_grad=True))
    where = "host" if device == "cuda" else device
    timings = time_in_turns(calls, arguments.rounds, 0.01, where)

    lines = []
    for name, timing in timings.items():
        multiple = timing.median / timings[UNIT].median
        target = TARGETS.get(name)
        verdict = "" if target is None else "pass" if multiple <= target else "miss"
        line = [name, f"{timing.median * 1e6:.2f}", f"{timing.spread:.0%}", f"{multiple:.2f}"]
        lines.append([*line, f"{target or ''}", verdict])

    environment = describe_environment(device)
    text = "\n\n".join(
        (
            f"# Overhead: {environment['device']}, {environment['date']}",
            "\n".join(f"- {name}: {value}" for name, value in environment.items()),
            "x and q: (1, 1, 4, 64), k: (1, 1, 2, 64), float32, one thread.",
            table(["call", "us", "spread", f"x {UNIT}", "target", ""], lines),
        )
    )
    figures = {name: asdict(timing) for name, timing in timings.items()}
    publish(text, {"environment": environment, "calls": figures}, arguments)


if __name__ == "__main__":
    main()
