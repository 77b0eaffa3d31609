"""How parts of P become a sum: along tensor parallelism first, then along data parallelism."""

from draw import SENT, WORK, arrow, box
from matplotlib.figure import Figure
from matplotlib.text import Text

OWNER = 1


def draw() -> Figure:
    """Six ranks, TP2 × DP3, and a matrix that data rank 1 owns."""
    figure = Figure(figsize=(9.5, 3.8))
    axes = figure.add_subplot(xlim=(-1.2, 10.2), ylim=(-0.9, 3.4))
    axes.axis("off")
    columns: list[list[Text]] = [[], []]
    for data, y in enumerate((2.4, 1.2, 0.0)):
        axes.text(-1.1, y, f"data rank {data}", va="center", fontsize=9)
        axes.text(5.1, y + 0.1, "the other's rows", ha="center", fontsize=8)
        for boxes, x, half in zip(columns, (2.6, 7.6), ("upper", "lower"), strict=True):
            task, color = ("orthonormalizes", SENT) if data == OWNER else ("sums", WORK)
            boxes.append(box(axes, x, y, f"{task} {half} rows", color))
    for left, right in zip(*columns, strict=True):
        arrow(axes, left, right)
        arrow(axes, right, left)
    for tensor, boxes in enumerate(columns):
        axes.text(boxes[0].get_position()[0], 3.05, f"tensor rank {tensor}", ha="center")
        arrow(axes, boxes[0], boxes[OWNER])
        arrow(axes, boxes[2], boxes[OWNER])
    axes.text(5.1, -0.6, "hop 1: between tensor ranks", ha="center", fontsize=9)
    axes.text(7.8, 0.6, "hop 2: to the owner", va="center", fontsize=9)
    return figure
