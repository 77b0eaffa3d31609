"""How parts of P become a sum: along tensor parallelism first, then along data parallelism."""

import matplotlib.pyplot as plt
from boxes import SENT, WORK, arrow, box
from matplotlib.figure import Figure

LEFT, RIGHT = 2.6, 7.6
WIDTH = 2.4
OWNER = 1  # of P, among the data ranks


def draw() -> Figure:
    """Six ranks; P belongs to one data rank, half of its rows to each tensor rank of that."""
    figure, axes = plt.subplots(figsize=(9.5, 3.8))
    axes.set(xlim=(-1.2, 11.6), ylim=(-0.9, 3.4))
    axes.axis("off")
    heights = [2.4, 1.2, 0.0]
    for data, y in enumerate(heights):
        axes.text(-1.1, y, f"data rank {data}", va="center", fontsize=9)
        arrow(axes, (LEFT + 1.25, y + 0.15), (RIGHT - 1.25, y + 0.15), "lower rows")
        arrow(axes, (RIGHT - 1.25, y - 0.15), (LEFT + 1.25, y - 0.15))
        axes.text((LEFT + RIGHT) / 2, y - 0.21, "upper rows", ha="center", va="top", fontsize=8)
        for x, half in ((LEFT, "upper"), (RIGHT, "lower")):
            text = f"all {half} rows,\northonormalizes" if data == OWNER else f"sums {half} rows"
            box(axes, x, y, text, SENT if data == OWNER else WORK, WIDTH)
            if data != OWNER:
                sign = 1 if data < OWNER else -1
                arrow(axes, (x, y - sign * 0.34), (x, heights[OWNER] + sign * 0.34))
    axes.text(LEFT, 3.05, "tensor rank 0", ha="center", fontsize=10)
    axes.text(RIGHT, 3.05, "tensor rank 1", ha="center", fontsize=10)
    axes.text((LEFT + RIGHT) / 2, -0.8, "hop 1: between tensor ranks", ha="center", fontsize=9)
    axes.text(9.3, 0.6, "hop 2: between\ndata ranks", va="center", fontsize=9)
    return figure
