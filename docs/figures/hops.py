"""How parts of P become a sum: along tensor parallelism first, then along data parallelism."""

import matplotlib.pyplot as plt
from boxes import SENT, WORK, arrow, box
from matplotlib.figure import Figure

LEFT, RIGHT = 2.6, 7.6
WIDTH = 2.4


def draw() -> Figure:
    """Six ranks, a matrix whose P is divided over two of them."""
    figure, axes = plt.subplots(figsize=(9.5, 3.8))
    axes.set(xlim=(-1.2, 11.6), ylim=(-0.9, 3.4))
    axes.axis("off")
    heights = [2.4, 1.2, 0.0]
    for data, y in enumerate(heights):
        axes.text(-1.1, y, f"data rank {data}", va="center", fontsize=9)
        arrow(axes, (LEFT + 1.25, y + 0.15), (RIGHT - 1.25, y + 0.15), "lower rows")
        arrow(axes, (RIGHT - 1.25, y - 0.15), (LEFT + 1.25, y - 0.15))
        axes.text((LEFT + RIGHT) / 2, y - 0.21, "upper rows", ha="center", va="top", fontsize=8)
        for x, half, in_charge in ((LEFT, "upper", data == 1), (RIGHT, "lower", data == 2)):
            text = f"all {half} rows,\northonormalizes" if in_charge else f"sums {half} rows"
            box(axes, x, y, text, SENT if in_charge else WORK, WIDTH)
    for x, start, end in ((LEFT, 0, 1), (LEFT, 2, 1), (RIGHT, 1, 2)):
        sign = 1 if start < end else -1
        arrow(axes, (x, heights[start] - sign * 0.34), (x, heights[end] + sign * 0.34))
    arrow(axes, (RIGHT + 1.25, heights[0]), (RIGHT + 1.25, heights[2] + 0.1), bend=-0.3)
    axes.text(LEFT, 3.05, "tensor rank 0", ha="center", fontsize=10)
    axes.text(RIGHT, 3.05, "tensor rank 1", ha="center", fontsize=10)
    axes.text((LEFT + RIGHT) / 2, -0.8, "hop 1: between tensor ranks", ha="center", fontsize=9)
    axes.text(10.3, 0.55, "hop 2: between\ndata ranks", va="center", fontsize=9)
    return figure
