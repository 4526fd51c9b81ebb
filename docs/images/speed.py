"""Draws the charts of speed.md from the reports: python docs/images/speed.py."""

import re

from matplotlib.axes import Axes
from results import Row, rows
from style import BLUE, PURPLE, TEXT, figure, save

EPYC = "2026-11-27-amd-epyc.md"
XEON = "2026-11-28-intel-xeon-norm.md"
H200 = "2026-11-27-nvidia-h200.md"
GREY = "#9a9a9a"

CPU_NAMES = (
    "torch-rope",
    "clone",
    "ONNX Runtime",
    "torch.compile",
    "eager PyTorch",
    "JAX",
    "rotary-embedding-torch",
    "torchtune",
    "MLX",
)


NORM_NAMES = {
    "torch-rope": "torch-rope, norm_apply",
    "apply": "torch-rope, rotation alone",
    "torch.compile, rms_norm + apply": "compiled rms_norm, apply",
    "torch.compile, tensor code": "compiled tensor code",
    "rms_norm + apply": "rms_norm, then apply",
    "tensor code": "eager tensor code",
}


def row_of(report: str, section: str, case: str) -> Row:
    """Returns the multiples of a copy of one case."""
    table = rows(report, section, "copy, ms")
    return next(row for row in table if row["case"] == case)


def bars(axes: Axes, values: dict[str, float], title: str) -> None:
    """Draws one bar for each implementation, shortest first, with its number."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    for place, (name, value) in enumerate(ordered):
        ours = name.startswith("torch-rope")
        color = BLUE if ours else GREY
        axes.barh(place, value, color=color, height=0.7)
        number = f"{value:.2f}" if value < 10 else f"{value:.0f}"
        axes.text(value, place, f" {number}", va="center", color=BLUE if ours else TEXT)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    for label, (name, _) in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_color(BLUE if name.startswith("torch-rope") else TEXT)
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])


def draw_cpu() -> None:
    """Times on a CPU, as multiples of a copy."""
    cases = (
        ("resident, 1 thread", "bfloat16 BSHD 512", "bfloat16, 512 tokens, warm output"),
        ("resident, 1 thread", "float32 BSHD 512", "float32, 512 tokens, warm output"),
        ("functional, 1 thread", "bfloat16 BSHD 4096", "bfloat16, 4,096 tokens, fresh output"),
    )
    drawing = figure(480, 720)
    found = [row_of(EPYC, section, case) for section, case, _ in cases]
    counts = [sum(bool(row.get(name)) for name in CPU_NAMES) for row in found]
    all_axes = drawing.subplots(len(cases), 1, height_ratios=counts)
    for axes, row, (_, _, title) in zip(all_axes, found, cases, strict=True):
        values = {name: float(row[name]) for name in CPU_NAMES if row.get(name)}
        bars(axes, values, title)
        axes.axvline(1, color=TEXT, lw=1, ls="--")
        axes.set_xlim(0, 1.15 * max(values.values()))
    drawing.supxlabel("time, in copies of the same bytes (dashed: 1)", fontsize=10.5)
    save(drawing, "speed-cpu")


def draw_norm() -> None:
    """Times of norm and rotation on a CPU, as multiples of a copy."""
    cases = (
        ("bfloat16 BSHD 512", "bfloat16, 512 tokens", 6),
        ("bfloat16 BSHD 4096, training", "bfloat16, 4,096, with backward", 5),
    )
    drawing = figure(480, 420)
    all_axes = drawing.subplots(2, 1, height_ratios=[count for *_, count in cases])
    for axes, (case, title, count) in zip(all_axes, cases, strict=True):
        row = row_of(XEON, "1 thread", case)
        names = dict(NORM_NAMES)
        if count == 5:  # There the rotation alone has no backward pass.
            del names["apply"]
        values = {label: float(row[name]) for name, label in names.items()}
        bars(axes, values, title)
        axes.axvline(1, color=TEXT, lw=1, ls="--")
        axes.set_xlim(0, 1.15 * max(values.values()))
    drawing.supxlabel("time, in copies of q and k (dashed: 1)", fontsize=10.5)
    save(drawing, "speed-norm")


def fraction(cell: str) -> float:
    """Returns the first number of a cell such as "flash-attn 0.88"."""
    return float(re.findall(r"\d+\.\d+", cell)[0])


def draw_gpu() -> None:
    """Speeds on an H200, as fractions of a copy's."""
    drawing = figure(480, 520)
    axes = drawing.subplots()
    table = rows(H200, "Operators, as a fraction of the copy's speed", "case")
    of_case = {row["case"]: row for row in table}
    names = {
        "BSHD, 16,384": "16,384 tokens",
        "BSHD, 4,096 tokens": "4,096",
        "BSHD, 1,024": "1,024",
        "BSHD, 256": "256",
        "64 sequences, one token": "64 x 1",
        "one token": "1",
        "BHSD, 4,096": "4,096, BHSD",
        "interleaved, 4,096": "4,096, interleaved",
        "float32, 4,096": "4,096, float32",
    }
    columns = (
        ("torch-rope", BLUE, "torch-rope 0.1.0"),
        ("best functional other", GREY, "fastest other that returns new tensors"),
        ("best other of any form", PURPLE, "fastest other, in place included"),
    )
    for offset, (column, color, label) in zip((-0.27, 0, 0.27), columns, strict=True):
        values = [fraction(of_case[case][column]) for case in names]
        places = [place + offset for place in range(len(names))]
        axes.barh(places, values, color=color, height=0.24, label=label)
    axes.axvline(1, color=TEXT, lw=1, ls="--")
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("speed, as a fraction of a copy's")
    drawing.legend(loc="outside upper left", labelcolor=TEXT)
    save(drawing, "speed-gpu")


if __name__ == "__main__":
    draw_cpu()
    draw_norm()
    draw_gpu()
