"""The first run: prints what is installed, and how fast and accurate it is on this machine."""

import argparse
import json
import logging
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

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
    gigabytes_per_second: float  # reads plus writes
    max_error: float | None  # largest difference from float64; None for copies
    max_error_ulp: float | None  # the same, in ulp at the length of the pair


def rotate_half(x: Tensor) -> Tensor:
    """Rotates each pair of elements of x by 90 degrees."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotate_eagerly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """Rotates with tensor operations, as models do, with tables of the dtype of q."""
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def tables(positions: Tensor, dtype: torch.dtype) -> Pair:
    """Returns the cosines and sines of each token, (S, 1, HEAD_DIM), formed in float64."""
    exponents = (
        torch.arange(0, HEAD_DIM, 2, dtype=torch.float64, device=positions.device) / HEAD_DIM
    )
    angles = positions[..., None] * MAX_WAVELENGTH**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the spacing of the numbers of a dtype at the length of each element's pair.

    Rounding is off by at most half of it. (The spacing at the element itself would be too strict:
    the element may be tiny because a sum cancels, which no computation in float32 can resolve.)
    """
    a, b = exact.chunk(2, dim=-1)
    _, exponent = torch.frexp(torch.hypot(a, b))
    distance = torch.finfo(dtype).eps * torch.exp2(exponent.double() - 1)
    return torch.cat((distance, distance), dim=-1)


def measure(device: str) -> list[Row]:
    """Times and checks each way to rotate q and k of one layer in bfloat16, interleaved."""
    # The timer's module warns if it finds a CUDA toolkit but no device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    torch.manual_seed(0)
    q = torch.randn(1, TOKENS, Q_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    k = torch.randn(1, TOKENS, K_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    positions = torch.arange(TOKENS, device=device)[:, None]
    cos, sin = tables(positions, torch.bfloat16)
    exact = rotate_eagerly(q.double(), k.double(), *tables(positions, torch.float64))

    warm = torch.empty_like(q), torch.empty_like(k)
    ways: dict[str, Callable[[], Pair]] = {
        "torch-rope": lambda: torch_rope.apply((q, k), positions, max_wavelength=MAX_WAVELENGTH),
        "eager PyTorch": lambda: rotate_eagerly(q, k, cos, sin),
        "clone": lambda: (q.clone(), k.clone()),
        "copy": lambda: (warm[0].copy_(q), warm[1].copy_(k)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            timer = Timer("way()", globals={"way": way}, num_threads=torch.get_num_threads())
            seconds[name].append(timer.blocked_autorange(min_run_time=SECONDS_PER_ROUND).median)

    units = tuple(ulp(reference, torch.bfloat16) for reference in exact)

    def row(name: str) -> Row:
        median = statistics.median(seconds[name])
        gigabytes_per_second = 2 * (q.nbytes + k.nbytes) / median / 1e9
        if name in ("clone", "copy"):
            return Row(name, median * 1e3, gigabytes_per_second, None, None)
        errors = [
            (y.double() - reference).abs() for y, reference in zip(ways[name](), exact, strict=True)
        ]
        in_units = [error / unit for error, unit in zip(errors, units, strict=True)]
        return Row(
            name,
            median * 1e3,
            gigabytes_per_second,
            max(error.max().item() for error in errors),
            max(error.max().item() for error in in_units),
        )

    return [row(name) for name in ways]


def describe(versions: dict[str, Any], device: str, rows: list[Row]) -> str:
    """Returns the report as text."""
    milliseconds = {row.name: row.milliseconds for row in rows}
    speedup = milliseconds["eager PyTorch"] / milliseconds["torch-rope"]
    copies = milliseconds["torch-rope"] / milliseconds["copy"]
    lines = [
        f"torch_rope {versions['torch_rope']}, torch {versions['torch']}, "
        f"python {versions['python']}",
        f"CPU capability {versions['cpu_capability']}, {torch.get_num_threads()} threads; "
        f"CUDA kernels: {'yes' if versions['cuda_kernels'] else 'no'}; "
        f"CUDA device: {versions['cuda_device'] or 'none'}",
        "",
        f"One layer of Llama-3-8B on {device}, bfloat16: "
        f"q (1, {TOKENS}, {Q_HEADS}, {HEAD_DIM}) and k (1, {TOKENS}, {K_HEADS}, {HEAD_DIM})",
        "",
        f"{'':14} {'ms':>9} {'GB/s':>9} {'largest error':>15}",
    ]
    for row in rows:
        error = "" if row.max_error_ulp is None else f"{row.max_error_ulp:.2f} ulp"
        line = f"{row.name:14} {row.milliseconds:9.3f} {row.gigabytes_per_second:9.1f} {error:>15}"
        lines.append(line.rstrip())
    lines += ["", "clone  reads and writes the same bytes, into new tensors, as the first two do."]
    clone = milliseconds["clone"]
    if (
        device == "cpu"
        and clone > 1.2 * milliseconds["copy"]
        and clone > milliseconds["torch-rope"]
    ):
        lines += [
            "       Most of its time goes into page faults. torch-rope asks for huge pages, which",
            "       fault less often.",
        ]
    lines += ["copy   is the same into warm buffers: what memory bandwidth allows."]
    if device == "cpu" and copies < 1:
        lines += [
            "       torch-rope writes large outputs with non-temporal stores, which read less."
        ]
    lines += [
        "ulp    is the distance between neighbouring bfloat16 numbers, at the length of the pair.",
        "       Rounding the exact result to bfloat16 costs up to 0.50.",
        "",
        f"torch-rope is {speedup:.1f} times as fast as eager PyTorch, in the time of {copies:.1f} "
        "copies: go on with",
        "help(torch_rope.apply), or torch_rope.integrations.transformers.patch for a model of "
        "Hugging Face.",
    ]
    return "\n".join(lines)


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

    print(describe(versions, device, rows))


if __name__ == "__main__":
    main()
