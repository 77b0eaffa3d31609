"""What error feedback is for: directions beyond the rank get their turn."""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from megatron_dion import Dion

STEPS = 160
SIZES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)
RANK = 2
COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")


def draw() -> Figure:
    """How far a weight has gone in each direction, with and without error feedback."""
    figure, (without, with_feedback) = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    _plot(without, _travel(feedback=False), "best rank 2 of the gradient, nothing kept")
    _plot(with_feedback, _travel(feedback=True), "Dion with rank 2: what is left out is kept in M")
    without.set_ylabel("way gone in this direction")
    with_feedback.legend(title="size in the\ngradient", bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.tight_layout()
    return figure


def _plot(axes: Axes, travel: Tensor, title: str) -> None:
    for direction, size in enumerate(SIZES):
        axes.plot(travel[:, direction].tolist(), color=COLORS[direction], label=f"{size:g}")
    axes.set_xlabel("step, the gradient stays the same")
    axes.set_title(title, fontsize=10)


def _travel(feedback: bool) -> Tensor:
    """The diagonal of the weight after each step (steps, directions)."""
    gradient = torch.diag(torch.tensor(SIZES))
    if not feedback:
        steps = torch.arange(1, STEPS + 1).unsqueeze(1)  # (steps, 1)
        largest = torch.arange(len(SIZES)) < RANK  # (directions)
        return steps * largest
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    rank_fraction = RANK / len(SIZES)
    optimizer = Dion([("weight", weight)], lr=1.0, scale_mode="dion", rank_fraction=rank_fraction)
    rows = []
    for _ in range(STEPS):
        weight.grad = gradient.clone()
        optimizer.step()
        rows.append(-weight.detach().diagonal().clone())
    return torch.stack(rows)
