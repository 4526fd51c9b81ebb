"""Draws what the page rope.md explains: python docs/images/rope.py."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Arc, FancyArrowPatch, FancyBboxPatch
from style import BLUE, FAINT, GREEN, ORANGE, PURPLE, TEXT, figure, plane, save

DEGREE = np.pi / 180


def arrow(axes: Axes, degrees: float, color: str, length: float = 1.0, **options: object) -> None:
    """Draws a vector from the origin."""
    end = (length * np.cos(degrees * DEGREE), length * np.sin(degrees * DEGREE))
    axes.add_patch(
        FancyArrowPatch(
            (0, 0),
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            color=color,
            lw=2.2,
            shrinkA=0,
            shrinkB=0,
            **options,
        )
    )


def at(degrees: float, length: float) -> tuple[float, float]:
    """Returns the end of a vector."""
    return length * np.cos(degrees * DEGREE), length * np.sin(degrees * DEGREE)


def arc(axes: Axes, begin: float, end: float, radius: float, color: str) -> None:
    """Draws the angle between two directions."""
    axes.add_patch(Arc((0, 0), 2 * radius, 2 * radius, theta1=begin, theta2=end, color=color, lw=2))


def draw_rotation() -> None:
    """One pair is a point of the plane; its position turns it."""
    drawing = figure(350, 290)
    axes = drawing.subplots()
    plane(axes, 1.3)
    axes.set_ylim(-0.35, 1.3)
    axes.set_xlim(-0.75, 1.3)
    begin, turn = 20.0, 62.0
    for degrees, color, a, b in ((begin, BLUE, "a", "b"), (begin + turn, ORANGE, "a'", "b'")):
        x, y = at(degrees, 1)
        axes.plot([x, x], [0, y], color=color, lw=1, ls=":")
        axes.plot([0, x], [y, y], color=color, lw=1, ls=":")
        axes.text(x, -0.06, a, color=color, ha="center", va="top", fontsize=12)
        axes.text(-0.05, y, b, color=color, ha="right", va="center", fontsize=12)
        arrow(axes, degrees, color)
    axes.text(*at(begin - 2, 1.06), "(a, b)", color=BLUE, fontsize=12, va="center")
    axes.text(*at(begin + turn - 3, 1.1), "(a', b')", color=ORANGE, ha="center", fontsize=12)
    arc(axes, begin, begin + turn, 0.42, TEXT)
    axes.text(*at(begin + turn / 2 + 8, 0.48), "angle t", va="center")
    axes.text(0.28, -0.27, "a' = a cos t - b sin t,    b' = b cos t + a sin t", ha="center")
    save(drawing, "rotation")


def draw_relative() -> None:
    """The angle between a query and a key changes by that of the distance."""
    drawing = figure(350, 215)
    for axes, n in zip(drawing.subplots(1, 2), (1, 3), strict=True):
        plane(axes, 1.0)
        axes.set_xlim(-1.05, 1.15)
        axes.set_ylim(-0.75, 1.3)
        m = n + 3
        step = 24.0
        k, q = 5.0 + n * step, -32.0 + m * step
        for degrees, color, name in ((k, GREEN, "k"), (q, PURPLE, "q")):
            arrow(axes, degrees, color)
            place = at(degrees, 1.14)
            axes.text(*place, name, color=color, ha="center", va="center", fontsize=12)
        arc(axes, k, q, 0.4, TEXT)
        axes.text(0.05, -0.5, f"q at {m}, k at {n}:\nm - n = 3", ha="center", va="center")
    save(drawing, "relative")


def draw_frequencies() -> None:
    """Cosines of some pairs, and the wavelength of every pair."""
    drawing = figure(480, 560)
    waves, wavelengths = drawing.subplots(2, 1, height_ratios=(2, 3))
    colors = (BLUE, ORANGE, GREEN, PURPLE)

    positions = np.linspace(0, 128, 600)
    for row, (pair, color) in enumerate(zip((0, 8, 16, 32), colors, strict=True)):
        center = -2.6 * row
        waves.plot(positions, center + np.cos(positions * 1e4 ** (-2 * pair / 128)), color=color)
        waves.text(-3, center, f"pair {pair}", color=color, ha="right", va="center")
    waves.set_title("cos(position · frequency), base 10,000, 64 pairs")
    waves.set_xlabel("position")
    waves.set_yticks([])
    waves.spines["left"].set_visible(False)
    waves.set_xticks(range(0, 129, 32))
    waves.set_xlim(0, 128)

    pairs = np.arange(64)
    for base, color, above in ((1e4, BLUE, 0.03), (5e5, ORANGE, 1.6)):
        wavelength = 2 * np.pi * base ** (2 * pairs / 128)
        wavelengths.plot(pairs, wavelength, color=color)
        wavelengths.text(63, above * wavelength[-1], f"base {base:,.0f}", color=color, ha="right")
    wavelengths.axhline(8192, color=TEXT, lw=1, ls="--")
    wavelengths.text(0, 8192 * 1.2, " 8,192 positions", va="bottom")
    wavelengths.set_yscale("log")
    wavelengths.set_ylim(3, 2e7)
    wavelengths.set_xlim(0, 63)
    wavelengths.set_xlabel("pair")
    wavelengths.set_title("wavelength: positions for one full turn")
    wavelengths.grid(axis="y")
    save(drawing, "frequencies")


def draw_pairs() -> None:
    """Which elements of a head form a pair."""
    drawing = figure(430, 400)
    axes = drawing.subplots()
    axes.axis("off")
    axes.set_aspect("equal")
    colors = (BLUE, ORANGE, GREEN, PURPLE)
    halves = [(n, n + 4) for n in range(4)]
    neighbours = [(2 * n, 2 * n + 1) for n in range(4)]
    rows = (
        ("halves: GPT-NeoX, Hugging Face (default)", halves, 0.0),
        ("interleaved: GPT-J, Meta's Llama (interleaved=True)", neighbours, -2.75),
        ("halves of the first 4 elements (rotary_dim=4)", [(0, 2), (1, 3)], -5.0),
    )
    for title, pairs, y in rows:
        color_of = {i: colors[n] for n, pair in enumerate(pairs) for i in pair}
        depth = 0.0
        for element in range(8):
            color = color_of.get(element, TEXT)
            axes.add_patch(
                FancyBboxPatch(
                    (element + 0.08, y),
                    0.84,
                    0.7,
                    boxstyle="round,pad=0,rounding_size=0.12",
                    facecolor=f"{color}33" if element in color_of else FAINT,
                    edgecolor=color,
                    lw=1.5 if element in color_of else 0.6,
                )
            )
            axes.text(element + 0.5, y + 0.33, str(element), ha="center", va="center", color=color)
        for a, b in pairs:
            depth = max(depth, 0.25 + 0.14 * (b - a))
            axes.add_patch(
                Arc(
                    ((a + b) / 2 + 0.5, y),
                    b - a,
                    2 * (0.25 + 0.14 * (b - a)),
                    theta1=180,
                    theta2=360,
                    color=color_of[a],
                    lw=2,
                )
            )
        axes.text(0.08, y + 0.95, title, va="bottom", fontsize=10.5)
    axes.set_xlim(-0.05, 8.05)
    axes.set_ylim(-5.7, 1.55)
    save(drawing, "pairs")


if __name__ == "__main__":
    draw_rotation()
    draw_relative()
    draw_frequencies()
    draw_pairs()
