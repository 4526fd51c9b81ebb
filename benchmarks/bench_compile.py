"""Measures attention blocks under torch.compile, with the kernel and with the decomposition.

python benchmarks/bench_compile.py
python benchmarks/bench_compile.py --json F.json --markdown F.md
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch_rope
from cases import DTYPES, MAX_WAVELENGTH, Pair
from report import add_outputs, describe_environment, publish, table
from timing import Timing, time_in_turns
from torch import Tensor
from torch.nn import functional

Q_HEADS = 16
K_HEADS = 4
HEAD_DIM = 128

FORMS = ("no rotation", "kernel", "composed")


@dataclass(frozen=True)
class Case:
    """A block, compiled once per form.

    Attributes:
        dtype: A key of ``DTYPES``; tables are float32 whatever it is.
        batch: The number of sequences.
        tokens: The length of each.
        angles: ``"positions"``, or precomputed ``"tables"`` of cosines and sines.
        backward: Whether to time the backward pass to the packed projection too.
    """

    dtype: str
    batch: int
    tokens: int
    angles: str
    backward: bool

    def __str__(self) -> str:
        """Returns the name of the table line."""
        passes = "forward + backward" if self.backward else "forward"
        return f"{self.dtype} {self.batch} x {self.tokens} {self.angles}, {passes}"


def list_cases() -> list[Case]:
    """Returns all cases, in the order of the table."""
    return [
        Case(dtype, batch, tokens, angles, backward)
        for dtype in ("float32", "bfloat16")
        for backward in (False, True)
        for angles in ("positions", "tables")
        for batch, tokens in ((1, 64), (1, 512), (1, 1024))
    ]


class Block:
    """Norms of q and k, the rotation, and attention, over the packed result of a projection."""

    def __init__(self, case: Case, device: str) -> None:
        """Makes random tensors."""
        torch.manual_seed(0)
        self.case = case
        dtype = DTYPES[case.dtype]
        heads = Q_HEADS + 2 * K_HEADS
        shape = (case.batch, case.tokens, heads, HEAD_DIM)
        self.packed = torch.randn(shape, dtype=dtype, device=device, requires_grad=case.backward)
        self.weights = [
            (1 + 0.1 * torch.randn(HEAD_DIM, device=device)).to(dtype) for _ in range(2)
        ]
        self.positions = torch.arange(case.tokens, device=device)[:, None]
        exponents = torch.arange(0, HEAD_DIM, 2, device=device, dtype=torch.float64) / HEAD_DIM
        angles = self.positions.double()[..., None] * MAX_WAVELENGTH**-exponents
        self.tables = angles.cos().float(), angles.sin().float()
        self.gradient = torch.randn(
            (case.batch, Q_HEADS, case.tokens, HEAD_DIM), dtype=dtype, device=device
        )

    def rotate(self, pair: Pair) -> Pair:
        """Rotates q and k."""
        if self.case.angles == "tables":
            return torch_rope.apply_cos_sin(pair, *self.tables)
        return torch_rope.apply(pair, self.positions)

    def forward(self, packed: Tensor, form: str) -> Tensor:
        """Attends; returns (B, Q_HEADS, S, HEAD_DIM)."""
        q, k, v = packed.split([Q_HEADS, K_HEADS, K_HEADS], dim=2)
        q = functional.rms_norm(q, (HEAD_DIM,), self.weights[0])
        k = functional.rms_norm(k, (HEAD_DIM,), self.weights[1])
        if form != "no rotation":
            with torch_rope.composed(form == "composed"):
                q, k = self.rotate((q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def compiled(self, form: str) -> Callable[[], Tensor]:
        """Returns a call of the compiled block, with its backward pass if the case has one."""
        forward = torch.compile(lambda packed: self.forward(packed, form), fullgraph=True)
        if not self.case.backward:
            return lambda: forward(self.packed)
        return lambda: torch.autograd.grad(forward(self.packed), self.packed, self.gradient)[0]


def check(actual: Tensor, expected: Tensor) -> None:
    """Raises AssertionError if two results differ by more than their dtype explains."""
    error = (actual - expected).norm() / expected.norm()
    if not error <= 8 * torch.finfo(actual.dtype).eps:
        raise AssertionError(f"composed and kernel differ by {error:.1e} of the result's norm")


def measure(case: Case, device: str, rounds: int, seconds: float) -> dict[str, Timing]:
    """Times the block with each form, in turn."""
    torch.compiler.reset()
    block = Block(case, device)
    calls = {form: block.compiled(form) for form in FORMS}
    check(calls["composed"](), calls["kernel"]())
    return time_in_turns(calls, rounds, seconds, device)


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default="", help="only cases with this in their name")
    parser.add_argument("--rounds", type=int, default=7, help="of all forms in turn")
    parser.add_argument("--seconds", type=float, default=0.05, help="of each form in a round")
    add_outputs(parser)
    arguments = parser.parse_args()
    device: str = arguments.device

    torch.set_num_threads(arguments.threads)
    lines, figures = [], {}
    for case in list_cases():
        if arguments.cases not in str(case):
            continue
        timings = measure(case, device, arguments.rounds, arguments.seconds)
        figures[str(case)] = {form: asdict(timing) for form, timing in timings.items()}
        none, kernel, composed = (timings[form].median * 1e3 for form in FORMS)
        lines.append(
            [
                str(case),
                *(f"{milliseconds:.3f}" for milliseconds in (none, kernel, composed)),
                f"{max(timing.spread for timing in timings.values()):.0%}",
                f"{composed / kernel:.2f}",
            ]
        )
        print(" | ".join(lines[-1]), flush=True)

    environment = describe_environment(device)
    header = ["block", *(f"{form}, ms" for form in FORMS), "spread", "composed / kernel"]
    text = "\n\n".join(
        (
            f"# Compiled attention blocks: {environment['device']}, {environment['date']}",
            "\n".join(f"- {name}: {value}" for name, value in environment.items()),
            f"{Q_HEADS} query and {K_HEADS} key heads of {HEAD_DIM}; {arguments.threads} threads.",
            table(header, lines),
        )
    )
    print()
    publish(text, {"environment": environment, "blocks": figures}, arguments)


if __name__ == "__main__":
    main()
