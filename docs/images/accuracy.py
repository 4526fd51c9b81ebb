"""Draws the errors of numbers.md from the report: python docs/images/accuracy.py."""

import math

from matplotlib.axes import Axes
from results import rows
from style import BLUE, GREEN, ORANGE, PURPLE, TEXT, figure, save

REPORT = "2026-11-28-accuracy.md"
FIRST = "positions from"


def curve(dtype: str, name: str) -> tuple[list[float], list[float]]:
    """Returns the middle of each range of positions, and the error there."""
    positions, errors = [], []
    for row in rows(REPORT, dtype, FIRST):
        error = row[name]
        if row[FIRST] == "0" or not error or error == "nan":
            continue
        positions.append(math.sqrt(2) * 2.0 ** int(row[FIRST].removeprefix("2^")))
        errors.append(float(error))
    return positions, errors


def prepare(axes: Axes, title: str) -> None:
    """Sets scales, ticks and labels."""
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([2.0**bit for bit in range(0, 31, 6)])
    axes.set_xlim(1, 2**31)
    axes.set_xlabel("position")
    axes.grid(axis="y")
    axes.minorticks_off()


def draw_float32() -> None:
    """Errors in float32."""
    drawing = figure(480, 330)
    axes = drawing.subplots()
    prepare(axes, "float32: largest error, over the length of the pair")
    for name in ("transformers", "torchtune", "rotary-embedding-torch", "x-transformers"):
        axes.plot(*curve("float32", name), color=ORANGE, lw=1.5)
    axes.plot(*curve("float32", "torch-rope"), color=BLUE)
    axes.text(
        2**12.5,
        1.2e-5,
        "float32 angles:\ntransformers, torchtune,\nx-transformers, ...",
        color=ORANGE,
        va="center",
    )
    axes.text(2**12.5, 2.5e-8, "torch-rope, max_wavelength", color=BLUE, va="center")
    axes.set_ylim(1e-8, 5)
    save(drawing, "accuracy")


def draw_bfloat16() -> None:
    """Errors in bfloat16, whose own rounding is 2^-8."""
    drawing = figure(480, 330)
    axes = drawing.subplots()
    prepare(axes, "bfloat16: largest error, over the length of the pair")
    axes.plot(*curve("bfloat16", "rotary-embedding-torch"), color=PURPLE)
    axes.plot(*curve("bfloat16", "transformers"), color=ORANGE)
    axes.plot(*curve("bfloat16", "x-transformers"), color=GREEN)
    axes.plot(*curve("bfloat16", "torch-rope"), color=BLUE)
    axes.text(2**0.4, 1.5, "rotary-\nembedding-\ntorch", color=PURPLE, va="center")
    axes.text(2**19.5, 0.03, "transformers", color=ORANGE, va="center")
    axes.text(2**16.5, 0.04, "torchtune,\nx-transformers", color=GREEN, va="center", ha="right")
    axes.text(2**20, 0.0026, "torch-rope", color=BLUE, va="center")
    axes.text(2**1, 0.0026, "one rounding: 2^-8 = 0.0039", color=TEXT, va="center")
    axes.set_ylim(1.5e-3, 5)
    save(drawing, "accuracy16")


if __name__ == "__main__":
    draw_float32()
    draw_bfloat16()
