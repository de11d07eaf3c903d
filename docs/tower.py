"""The README's first figure: python docs/tower.py [FILE] draws docs/tower.svg."""

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Okabe and Ito's palette; goals go down in one colour, windows up in another.
GOAL, WINDOW, ACTS = "#D55E00", "#0072B2", "#009E73"
INK, GREY, PALE, CARD = "#1A1A1A", "#5A5A5A", "#F2F2F2", "#FFFFFF"
WIDTH, HEIGHT, STEPS = 8.6, 6.7, 33
# Text becomes outlines, so it looks the same everywhere; its words stay as comments.
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "tower", "font.size": 9.5}


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str):
    """A rounded box; x and y are its lower left corner, in inches."""
    shape = "round,pad=0,rounding_size=0.08"
    patch = FancyBboxPatch((x, y), width, height, shape, fc=colour, ec=GREY, lw=0.8)
    axes.add_patch(patch)


def part(axes: Axes, x: float, y: float, width: float, name: str, *files: str):
    """One part of a level: what it is, and the files that hold it."""
    box(axes, x, y, width, 0.8, CARD)
    axes.text(x + width / 2, y + 0.57, name, ha="center", va="center", color=INK)
    for place, file in enumerate(files):
        centre = x + width * (place + 0.5) / len(files)
        axes.text(
            *(centre, y + 0.25, file),
            **{"ha": "center", "va": "center", "family": "monospace", "color": INK},
        )


def arrow(axes: Axes, x: float, start: float, end: float, colour: str, label: str):
    """A vertical arrow with its label to the right."""
    axes.annotate(
        "",
        (x, end),
        (x, start),
        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0},
    )
    axes.text(x + 0.12, (start + end) / 2, label, va="center", color=colour)


def level(axes: Axes, number: int, y: float):
    """One level of the tower, and to its right the steps at which it acts."""
    box(axes, 0.15, y, 5.85, 1.2, PALE)
    axes.text(0.3, y + 1.0, f"level {number}", va="center", weight="bold", color=INK)
    part(axes, 0.3, y + 0.08, 1.75, "world model", "s5wm.py", "s5.py")
    part(axes, 2.13, y + 0.08, 1.2, "actor-critic", "subactor.py")
    part(axes, 3.41, y + 0.08, 1.32, "goal ↔ code", "subgoal.py")
    part(axes, 4.81, y + 0.08, 1.1, "replay", "etbs.py")
    every = 4**number
    for step in range(STEPS):
        x, acts = 6.25 + 2.1 * step / (STEPS - 1), step % every == 0
        reach = 0.22 if acts else 0.05
        colour, width = (ACTS, 2.2) if acts else (GREY, 0.6)
        axes.plot([x, x], [y + 0.4 - reach, y + 0.4 + reach], color=colour, lw=width)
    often = "every step" if every == 1 else f"every {every} steps"
    axes.text(6.22, y + 0.88, f"acts {often}", va="center", color=ACTS)


def draw() -> Figure:
    """The tower: goals down, windows up, each level four times slower."""
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=CARD)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0.1, HEIGHT + 0.1))
    axes.axis("off")
    levels = {0: 1.75, 1: 3.55, 2: 5.35}
    for number, y in levels.items():
        level(axes, number, y)
    for number in (1, 2):
        above, below = levels[number], levels[number - 1] + 1.2
        held = 4**number
        arrow(axes, 0.6, below, above, WINDOW, "window of 4 latents")
        arrow(axes, 2.73, above, below, GOAL, f"goal, held for {held} steps")
    arrow(axes, 0.6, 1.15, 1.75, WINDOW, "picture, reward")
    arrow(axes, 2.73, 1.75, 1.15, GOAL, "action")
    box(axes, 0.15, 0.75, 5.85, 0.4, PALE)
    axes.text(0.3, 0.95, "game", va="center", weight="bold", color=INK)
    mono = {"va": "center", "family": "monospace", "color": INK}
    axes.text(1.15, 0.95, "atari.py   minatar_env.py   probes.py", **mono)
    axes.text(6.22, 1.47, "steps of the game", va="center", color=GREY)
    axes.text(6.22, 0.95, "who acts when", va="center", color=INK)
    axes.text(7.45, 0.95, "hieros.py", **mono)
    axes.text(0.15, 0.45, "parts of all levels", va="center", color=INK)
    axes.text(1.75, 0.45, "nets.py", **mono)
    axes.text(2.73, 0.45, "all around them", va="center", color=INK)
    axes.text(4.13, 0.45, "config.py   agent.py   run.py   train.py", **mono)
    return figure


def main():
    path = sys.argv[1] if sys.argv[1:] else Path(__file__).with_suffix(".svg")
    with rc_context(STYLE):
        draw().savefig(path, metadata={"Date": None}, dpi=96)


if __name__ == "__main__":
    main()
