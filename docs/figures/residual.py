"""Singular values of an update: Muon's, Dion's, and Dion's with the residual."""

import torch
from matplotlib.figure import Figure

from megatron_dion import Dion

SIZE, STEPS = 128, 30
UPDATES = (
    ("Dion, 1/4", {"rank_fraction": 0.25, "residual": "none"}, "#d95f02"),
    ("Dion, 1/4, with the residual", {"rank_fraction": 0.25}, "#1b9e77"),
    ("Dion, 1/16, with the residual", {"rank_fraction": 0.0625}, "#7570b3"),
)


def draw() -> Figure:
    """Spectra of the updates of one matrix, in units of an orthonormal matrix."""
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE)).Q for _ in range(2))
    values = 1 / (1 + torch.arange(SIZE) / 8)
    gradient = left @ torch.diag(values) @ right  # (128, 128)
    figure = Figure(figsize=(6.5, 3.4), layout="tight")
    axes = figure.subplots()
    axes.plot(values / values[0], color="black", label="B, largest = 1")
    axes.plot(torch.ones(SIZE), color="gray", linestyle="--", label="Muon (exactly orthonormal)")
    for name, options, color in UPDATES:
        weight = torch.nn.Parameter(torch.zeros(SIZE, SIZE))
        optimizer = Dion([("weight", weight)], lr=1.0, **options)
        for _ in range(STEPS):
            before = weight.detach().clone()
            weight.grad = gradient.clone()
            optimizer.step()
        update = (before - weight.detach()) / optimizer.config.scale(SIZE, SIZE)
        axes.plot(torch.linalg.svdvals(update), color=color, label=name)
    axes.set(xlabel="number of the singular value", ylabel="size", ylim=(0, 3.2))
    axes.legend(loc="upper right")
    return figure
