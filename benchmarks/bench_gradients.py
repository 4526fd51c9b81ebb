"""Measures the gradients of positions, inv_freq and tables.

python benchmarks/bench_gradients.py
python benchmarks/bench_gradients.py --device cpu --json F.json --markdown F.md
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
import torch_rope
from report import add_outputs, describe_environment, publish, table
from timing import Timing, capture, count_buffers, l2_size, time_graphs, time_in_turns
from torch import Tensor

# A copy reads and writes q; a gradient reads q and its gradient: the same number of bytes.
COPY = "copy_ of q"

SHAPES = [(1, 4096, 32, 128), (64, 128, 32, 128), (1, 4096, 1, 64)]


def list_calls(shape: tuple[int, ...], device: str) -> dict[str, Callable[[], object]]:
    """Returns backward passes for these gradients only."""
    _, tokens, _, size = shape
    q, gradient = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2))
    positions = torch.arange(tokens, device=device, dtype=torch.float32).unsqueeze(-1)
    inv_freq = 10000.0 ** -torch.arange(0, 1, 2 / size, device=device)
    angles = positions.unsqueeze(-1) * inv_freq
    cos, sin, inv_freq = (x.requires_grad_() for x in (angles.cos(), angles.sin(), inv_freq))
    by_positions = torch_rope.apply(q, positions.requires_grad_(), inv_freq)
    by_tables = torch_rope.apply_cos_sin(q, cos, sin)
    rows = torch.arange(tokens, device=device).unsqueeze(-1)
    by_rows = torch_rope.apply_cos_sin(q, cos.squeeze(1), sin.squeeze(1), rows)

    def backward(output: Tensor, *inputs: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    result = torch.empty_like(q)
    return {
        COPY: lambda: result.copy_(q),
        "inv_freq": backward(by_positions, inv_freq),
        "positions": backward(by_positions, positions),
        "cos and sin": backward(by_tables, cos, sin),
        "cos and sin, by row": backward(by_rows, cos, sin),
    }


def measure(shape: tuple[int, ...], device: str, rounds: int) -> Mapping[str, Timing]:
    """Times all calls; on CUDA in graphs, over sets of buffers that exceed the L2."""
    if device == "cpu":
        return time_in_turns(list_calls(shape, device), rounds, 0.05, device)
    count = count_buffers(2 * 2 * math.prod(shape), l2_size())
    with torch.cuda.stream(torch.cuda.Stream()):
        buffers = [list_calls(shape, device) for _ in range(count)]
        graphs = {name: capture([calls[name] for calls in buffers]) for name in buffers[0]}
        return time_graphs(graphs, rounds)


def report(by_shape: Mapping[str, Mapping[str, Timing]], environment: dict[str, str]) -> str:
    """Returns the whole report in Markdown."""
    parts = [
        f"# Gradients of angles: {environment['device']}, {environment['date']}",
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
        "Backward passes for these gradients only, without that of q; bfloat16.",
    ]
    for shape, timings in by_shape.items():
        copy = timings[COPY].median
        lines = [
            [name, f"{one.median * 1e6:.1f}", f"{one.spread:.0%}", f"{one.median / copy:.2f}"]
            for name, one in timings.items()
        ]
        parts += [f"## q of shape {shape}", table(["of", "us", "spread", "x copy"], lines)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--rounds", type=int, default=7, help="of all calls in turn")
    add_outputs(parser)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    by_shape = {str(shape): measure(shape, arguments.device, arguments.rounds) for shape in SHAPES}
    environment = describe_environment(arguments.device)
    text = report(by_shape, environment)
    shapes = {
        shape: {name: asdict(one) for name, one in timings.items()}
        for shape, timings in by_shape.items()
    }
    publish(text, {"environment": environment, "shapes": shapes}, arguments)


if __name__ == "__main__":
    main()
