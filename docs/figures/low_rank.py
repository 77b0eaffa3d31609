"""What a low rank captures of a matrix, and what becomes of its singular values."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from megatron_dion import Dion

SIZE = 128
STEPS = 30
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def draw() -> Figure:
    """Energy that each rank captures, and the spectra of gradient and update."""
    figure, (energies, spectra) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    gradient = _gradient()
    values = torch.linalg.svdvals(gradient)
    best = (values.square().cumsum(0) / values.square().sum()).tolist()
    energies.plot([(i + 1) / SIZE for i in range(SIZE)], best, color="black", label="best possible")
    updates = {fraction: _update(gradient, fraction) for fraction in FRACTIONS}
    caught = [_captured(gradient, update) for update in updates.values()]
    energies.plot(FRACTIONS, caught, "o", color="#d95f02", label=f"Dion, after {STEPS} steps")
    energies.set(xlabel="rank fraction", ylabel="share of ‖gradient‖² captured", ylim=(0, 1.05))
    energies.set_xscale("log", base=2)
    energies.set_xticks(FRACTIONS, ["1/16", "1/8", "1/4", "1/2", "1"])
    energies.legend(loc="lower right")

    spectra.plot((values / values[0]).tolist(), color="black", label="gradient")
    for fraction, name, color in ((0.25, "1/4", "#d95f02"), (1.0, "1", "#7570b3")):
        sizes = torch.linalg.svdvals(updates[fraction])
        label = f"Dion's update, rank fraction {name}"
        spectra.plot((sizes / sizes[0]).tolist(), color=color, label=label)
    spectra.set(xlabel="number of the singular value", ylabel="size, largest = 1", ylim=(0, 1.35))
    spectra.legend(loc="upper right")
    figure.tight_layout()
    return figure


def _gradient() -> Tensor:
    """A square matrix whose singular values fall as 1 / (1 + i / 8)."""
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE)).Q for _ in range(2))
    values = 1 / (1 + torch.arange(SIZE) / 8)
    return left @ torch.diag(values) @ right  # (128, 128)


def _update(gradient: Tensor, fraction: float) -> Tensor:
    """The change of a weight in the last of some steps with one and the same gradient."""
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = Dion([("weight", weight)], lr=1.0, rank_fraction=fraction)
    for _ in range(STEPS):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    return before - weight.detach()


def _captured(gradient: Tensor, update: Tensor) -> float:
    """Share of the squared norm within the space of the update's rows."""
    _, sizes, rows = torch.linalg.svd(update)
    kept = rows[sizes > 0.01 * sizes[0]]  # (r, 128)
    return float((gradient @ kept.T).square().sum() / gradient.square().sum())
