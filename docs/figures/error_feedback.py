"""What error feedback is for: directions beyond the rank get their turn."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from megatron_dion import Dion

STEPS, RANK = 160, 2
SIZES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)


def draw() -> Figure:
    """How far a weight has gone in each direction, with and without error feedback."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    without, with_feedback = figure.subplots(1, 2, sharey=True)
    without.plot(torch.arange(1, STEPS + 1).outer(torch.arange(len(SIZES)) < RANK))
    without.set_title("best rank 2 of the gradient, nothing kept", fontsize=10)
    with_feedback.plot(_travel(), label=[f"{size:g}" for size in SIZES])
    with_feedback.set_title("Dion with rank 2: what is left out is kept in M", fontsize=10)
    figure.supxlabel("step, the gradient stays the same", fontsize=10)
    without.set_ylabel("way gone in this direction")
    with_feedback.legend(title="size in the\ngradient", bbox_to_anchor=(1.0, 1.0), loc="upper left")
    return figure


def _travel() -> Tensor:
    """The diagonal of the weight after each of Dion's steps (steps, directions)."""
    gradient = torch.diag(torch.tensor(SIZES))
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = Dion(
        [("weight", weight)],
        lr=1.0,
        scale_mode="dion",
        rank_fraction=RANK / len(SIZES),
        residual="none",
    )
    rows = []
    for _ in range(STEPS):
        weight.grad = gradient.clone()
        optimizer.step()
        rows.append(-weight.detach().diagonal().clone())
    return torch.stack(rows)
