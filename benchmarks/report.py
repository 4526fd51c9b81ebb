"""Shared by the reports: the description of the machine, tables, output files."""

import argparse
import datetime
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch_rope

PACKAGES = (
    "jax",
    "onnxruntime",
    "mlx",
    "torchtune",
    "rotary-embedding-torch",
    "transformers",
    "x-transformers",
    "flash-attn",
    "flashinfer-python",
    "liger-kernel",
    "axolotl",
    "transformer-engine",
    "triton",
)


def offers_huge_pages() -> bool:
    """Returns whether the system provides huge pages through madvise."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return switch.exists() and "[never]" not in switch.read_text()


def processor() -> str:
    """Returns the CPU's name, family and model (virtual machines shorten the name)."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    if "model name" not in found:
        return platform.processor()
    kind = [f"{name} {found[name]}" for name in ("cpu family", "model") if name in found]
    return ", ".join([found["model name"], *kind])


def describe_environment(device: str) -> dict[str, str]:
    """Returns the machine and the versions of packages."""
    environment = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "huge pages by madvise": "yes" if offers_huge_pages() else "no",
        "torch-rope": torch_rope.__version__,
        "torch": torch.__version__,
    }
    if device == "cuda":
        environment["CUDA"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            environment[package] = version(package)
        except PackageNotFoundError:
            continue
    return environment


def table(header: list[str], lines: list[list[str]]) -> str:
    """Returns an aligned Markdown table."""
    cells = [header, *lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    rows = (map(str.ljust, line, widths) for line in [header, rule, *lines])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that ``publish`` reads."""
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--markdown", type=Path, help="write the report here")


def publish(text: str, figures: dict[str, object], arguments: argparse.Namespace) -> None:
    """Prints a report, and writes it and its figures to the files in the arguments."""
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text.rstrip("\n") + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
