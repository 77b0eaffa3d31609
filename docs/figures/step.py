"""What flows where in a step of one matrix."""

from draw import EDGE, SENT, STATE, WORK, arrow, box
from matplotlib.figure import Figure
from matplotlib.patches import Patch

BOXES = {
    "G": (0.4, 3.2, "gradient G\nm × n", WORK),
    "M": (0.4, 2.0, "momentum M\nm × n", STATE),
    "Q": (0.4, 0.6, "right factor Q\nm × r", STATE),
    "B": (2.9, 2.6, "B = M + G\nm × n", WORK),
    "sum": (5.2, 2.6, "sum of BᵀQ\nn × r", SENT),
    "P": (7.5, 2.6, "P: orthonormal\nn × r", SENT),
    "R": (7.5, 1.2, "R = B P\nm × r", SENT),
    "M*": (10.8, 2.6, "M = B − (1−μ) R Pᵀ", STATE),
    "Q*": (10.8, 1.2, "Q = R / column norms", STATE),
    "W*": (10.8, -0.2, "W −= lr · scale · Q Pᵀ", STATE),
}
ARROWS = "G>B M>B B>sum Q>sum sum>P P>R B>R P>M* R>Q* Q*>W* P>W*"


def draw() -> Figure:
    """Gradient and state on the left, what becomes of them on the right."""
    figure = Figure(figsize=(9.5, 4.2))
    axes = figure.add_subplot(xlim=(-0.6, 12.2), ylim=(-0.75, 4.1))
    axes.axis("off")
    boxes = {name: box(axes, *place) for name, place in BOXES.items()}
    for ends in ARROWS.split():
        start, end = ends.split(">")
        arrow(axes, boxes[start], boxes[end])
    texts = ("kept between steps", "summed or sent between ranks", "on this rank only")
    legend = [
        Patch(facecolor=color, edgecolor=EDGE, label=text)
        for text, color in zip(texts, (STATE, SENT, WORK), strict=True)
    ]
    axes.legend(handles=legend, loc="lower center", ncols=3, bbox_to_anchor=(0.45, -0.12))
    return figure
