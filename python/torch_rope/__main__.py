"""The first run: shows what is installed, and how fast and exact it is on this machine."""

import argparse
import json
import logging
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import torch_rope
from torch_rope import _C

# Llama-3-8B: 32 query heads, 8 key heads, head_dim 128, rope_theta 500000.
TOKENS, Q_HEADS, K_HEADS, HEAD_DIM, MAX_WAVELENGTH = 2048, 32, 8, 128, 500000.0

ROUNDS = 3
SECONDS_PER_ROUND = 0.1

Pair = tuple[Tensor, Tensor]


@dataclass
class Row:
    """One line of the table."""

    name: str
    milliseconds: float
    gigabytes_per_second: float  # read and written
    max_error: float | None  # largest difference from float64; a copy has none


def rotate_half(x: Tensor) -> Tensor:
    """Turns each pair of elements of x by a right angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotate_eagerly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """Rotates as models without a kernel do, with tables of the dtype of q."""
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def tables(positions: Tensor, dtype: torch.dtype) -> Pair:
    """Gives the cosines and sines of each token, (S, 1, HEAD_DIM), formed in float64."""
    exponents = (
        torch.arange(0, HEAD_DIM, 2, dtype=torch.float64, device=positions.device) / HEAD_DIM
    )
    angles = positions[..., None] * MAX_WAVELENGTH**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def measure(device: str) -> list[Row]:
    """Times and checks each way to rotate q and k of one layer, bfloat16, in turns."""
    # The timer's module looks for a CUDA toolkit, and warns of one without a device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    torch.manual_seed(0)
    q = torch.randn(1, TOKENS, Q_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    k = torch.randn(1, TOKENS, K_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    positions = torch.arange(TOKENS, device=device)[:, None]
    cos, sin = tables(positions, torch.bfloat16)
    exact = rotate_eagerly(q.double(), k.double(), *tables(positions, torch.float64))

    ways: dict[str, Callable[[], Pair]] = {
        "torch-rope": lambda: torch_rope.apply((q, k), positions, max_wavelength=MAX_WAVELENGTH),
        "eager PyTorch": lambda: rotate_eagerly(q, k, cos, sin),
        "copy": lambda: (q.clone(), k.clone()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            timer = Timer("way()", globals={"way": way}, num_threads=torch.get_num_threads())
            seconds[name].append(timer.blocked_autorange(min_run_time=SECONDS_PER_ROUND).median)

    def row(name: str) -> Row:
        median = statistics.median(seconds[name])
        error = None
        if name != "copy":
            error = max(
                (y.double() - reference).abs().max().item()
                for y, reference in zip(ways[name](), exact, strict=True)
            )
        return Row(name, median * 1e3, 2 * (q.nbytes + k.nbytes) / median / 1e9, error)

    return [row(name) for name in ways]


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(prog="python -m torch_rope", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    as_json = parser.parse_args().json

    device = "cuda" if torch.cuda.is_available() and _C.has_cuda else "cpu"
    versions = {
        "torch_rope": torch_rope.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_kernels": _C.has_cuda,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    rows = measure(device)
    if as_json:
        print(json.dumps({**versions, "device": device, "rows": [asdict(row) for row in rows]}))
        return

    installed = ("torch_rope", "torch", "python")
    print(", ".join(f"{name} {versions[name]}" for name in installed))
    print(
        f"CPU capability {versions['cpu_capability']}, {torch.get_num_threads()} threads; "
        f"CUDA kernels: {'yes' if versions['cuda_kernels'] else 'no'}; "
        f"CUDA device: {versions['cuda_device'] or 'none'}"
    )
    print(
        f"\nq (1, {TOKENS}, {Q_HEADS}, {HEAD_DIM}) and k (1, {TOKENS}, {K_HEADS}, {HEAD_DIM}) "
        f"of a Llama-3-8B layer, bfloat16, on {device}; fresh outputs\n"
    )
    print(f"{'':14} {'ms':>9} {'GB/s':>9} {'error against float64':>23}")
    for line in rows:
        error = "" if line.max_error is None else f"{line.max_error:.1e}"
        print(
            f"{line.name:14} {line.milliseconds:9.3f} {line.gigabytes_per_second:9.1f} {error:>23}"
        )


if __name__ == "__main__":
    main()
