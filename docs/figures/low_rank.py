"""What a low rank captures of a matrix, and what becomes of its singular values."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from megatron_dion import Dion

SIZE, STEPS = 128, 30
FRACTIONS = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0}


def draw() -> Figure:
    """Energy that each rank captures, and the spectra of gradient and update."""
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE)).Q for _ in range(2))
    values = 1 / (1 + torch.arange(SIZE) / 8)
    gradient = left @ torch.diag(values) @ right  # (128, 128)
    updates = {name: _update(gradient, fraction) for name, fraction in FRACTIONS.items()}

    figure = Figure(figsize=(9.5, 3.4), layout="tight")
    energies, spectra = figure.subplots(1, 2)
    best = values.square().cumsum(0) / values.square().sum()
    energies.plot((torch.arange(SIZE) + 1) / SIZE, best, color="black", label="best possible")
    captured = [_captured(gradient, update) for update in updates.values()]
    label = f"Dion, after {STEPS} steps"
    energies.plot(list(FRACTIONS.values()), captured, "o", color="#d95f02", label=label)
    energies.set(xlabel="rank fraction", ylabel="share of ‖gradient‖² captured", ylim=(0, 1.05))
    energies.set_xscale("log", base=2)
    energies.set_xticks(list(FRACTIONS.values()), list(FRACTIONS))
    energies.legend(loc="lower right")
    spectra.plot(values / values[0], color="black", label="gradient")
    for name, color in (("1/4", "#d95f02"), ("1", "#7570b3")):
        sizes = torch.linalg.svdvals(updates[name]) / torch.linalg.matrix_norm(updates[name], 2)
        spectra.plot(sizes, color=color, label=f"Dion's update, rank fraction {name}")
    spectra.set(xlabel="number of the singular value", ylabel="size, largest = 1", ylim=(0, 1.35))
    spectra.legend(loc="upper right")
    return figure


def _update(gradient: Tensor, fraction: float) -> Tensor:
    """The change of a weight in the last of some steps with one and the same gradient."""
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = Dion([("weight", weight)], lr=1.0, rank_fraction=fraction, residual="none")
    for _ in range(STEPS):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    return before - weight.detach()


def _captured(gradient: Tensor, update: Tensor) -> float:
    """Share of the gradient's squared norm within the space of the update's rows."""
    _, sizes, rows = torch.linalg.svd(update)
    return float((gradient @ rows[sizes > 0.01 * sizes[0]].T).norm() ** 2 / gradient.norm() ** 2)
