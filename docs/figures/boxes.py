"""Boxes with text, and arrows between them."""

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

STATE = "#cfe3f5"
WORK = "#f7f7f7"
SENT = "#fde0b8"
EDGE = "#444444"


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.6) -> None:
    """A box around (x, y)."""
    height = 0.62
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            *(width, height),
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=color,
            edgecolor=EDGE,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    bend: float = 0.0,
) -> None:
    """An arrow with a text beside its middle."""
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": EDGE,
            "connectionstyle": f"arc3,rad={bend}",
        },
    )
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    if text:
        axes.text(x, y + 0.12, text, ha="center", va="bottom", fontsize=8, color=EDGE)
