"""Draws the figures of the documentation into docs/images: `python docs/figures/draw.py`.

Each module that is named below has a function `draw`; the package computes what it shows.
"""

import argparse
from importlib import import_module
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.text import Text

NAMES = ("step", "low_rank", "residual", "error_feedback", "shards", "hops", "cost")
IMAGES = Path(__file__).parent.parent / "images"
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "legend.frameon": False,
    "svg.hashsalt": "megatron-dion",  # the same file whenever the picture is the same
}
STATE, SENT, WORK, EDGE = "#cfe3f5", "#fde0b8", "#f7f7f7", "#444444"


def box(axes: Axes, x: float, y: float, text: str, color: str) -> Text:
    """A text in a box around (x, y)."""
    frame = {"boxstyle": "round,pad=0.5", "facecolor": color, "edgecolor": EDGE}
    return axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame)


def arrow(axes: Axes, start: Text, end: Text) -> None:
    """An arrow from one box to another."""
    ends = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    style = {"arrowstyle": "-|>", "color": EDGE, "shrinkA": 0, "shrinkB": 3}
    axes.annotate("", end.get_position(), start.get_position(), arrowprops=ends | style)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder for the SVG files")
    folder = parser.parse_args().output
    matplotlib.rcParams.update(STYLE)
    for name in NAMES:
        figure = import_module(name).draw()
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
