"""What flows where in a step of one matrix."""

import matplotlib.pyplot as plt
from boxes import SENT, STATE, WORK, arrow, box
from matplotlib.figure import Figure
from matplotlib.patches import Patch


def draw() -> Figure:
    """Gradient and state on the left, what becomes of them on the right."""
    figure, axes = plt.subplots(figsize=(9.5, 4.2))
    axes.set(xlim=(-0.6, 11.7), ylim=(-0.75, 4.1))
    axes.axis("off")
    box(axes, 0.4, 3.2, "gradient G\nm × n", WORK)
    box(axes, 0.4, 2.0, "momentum M\nm × n", STATE)
    box(axes, 0.4, 0.4, "right factor Q\nm × r", STATE)
    box(axes, 2.9, 2.6, "B = M + G\nm × n", WORK)
    box(axes, 5.2, 2.6, "sum of BᵀQ\nn × r", SENT)
    box(axes, 7.5, 2.6, "P: orthonormal\nn × r", SENT)
    box(axes, 7.5, 1.2, "R = B P\nm × r", SENT)
    box(axes, 10.3, 2.6, "M = B − (1−μ) R Pᵀ", STATE, 2.3)
    box(axes, 10.3, 1.2, "Q = R / column norms", STATE, 2.3)
    box(axes, 10.3, -0.2, "W −= lr · scale · Q Pᵀ", STATE, 2.3)
    for start, end in (
        ((1.25, 3.1), (2.05, 2.75)),
        ((1.25, 2.1), (2.05, 2.45)),
        ((3.75, 2.6), (4.35, 2.6)),
        ((6.05, 2.6), (6.65, 2.6)),
        ((7.5, 2.25), (7.5, 1.55)),
        ((8.35, 2.6), (9.1, 2.6)),
        ((8.35, 1.2), (9.1, 1.2)),
        ((10.3, 0.85), (10.3, 0.15)),
    ):
        arrow(axes, start, end)
    arrow(axes, (1.25, 0.45), (4.9, 2.25), bend=0.12)
    arrow(axes, (3.1, 2.25), (6.65, 1.2), bend=0.18)
    arrow(axes, (8.2, 2.25), (9.1, -0.1), bend=0.12)
    legend = [
        Patch(facecolor=STATE, edgecolor="#444444", label="kept between steps"),
        Patch(facecolor=SENT, edgecolor="#444444", label="summed or sent between ranks"),
        Patch(facecolor=WORK, edgecolor="#444444", label="on this rank only"),
    ]
    axes.legend(handles=legend, loc="lower center", ncols=3, bbox_to_anchor=(0.45, -0.12))
    return figure
