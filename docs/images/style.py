"""How all figures look: one SVG that is legible on light and on dark pages."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("svg")

FOLDER = Path(__file__).parent

# Every colour has a contrast of at least 3 with white and with near black, the text 4.3 with both.
TEXT = "#7c7c7c"
FAINT = "#a0a0a055"  # With alpha: fits both.
BLUE, ORANGE, GREEN, PURPLE = "#3b82f6", "#e07a1f", "#2f9e55", "#a26bf0"

mpl.rcParams.update(
    {
        "axes.edgecolor": TEXT,
        "axes.labelcolor": TEXT,
        "axes.linewidth": 0.8,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": TEXT,
        "axes.titlesize": 11,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "font.size": 11,
        "grid.color": FAINT,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.labelcolor": "linecolor",
        "lines.linewidth": 2,
        "savefig.facecolor": "none",
        "svg.hashsalt": "torch-rope",  # The same file every time.
        "text.color": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
)


def figure(width: float, height: float) -> Figure:
    """Makes a figure; sizes are in CSS pixels. A phone shows 350 of them next to each other."""
    return Figure(figsize=(width / 96, height / 96), layout="constrained")


def plane(axes: Axes, limit: float) -> None:
    """Draws the axes of the upper half of a plane, without numbers."""
    axes.set_aspect("equal")
    axes.axis("off")
    axes.plot((-limit, limit), (0, 0), color=FAINT, linewidth=1)
    axes.plot((0, 0), (-limit / 8, limit), color=FAINT, linewidth=1)


def save(drawing: Figure, name: str) -> None:
    """Writes an SVG without a date."""
    path = FOLDER / f"{name}.svg"
    drawing.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    # Matplotlib leaves blanks at the ends of lines.
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
