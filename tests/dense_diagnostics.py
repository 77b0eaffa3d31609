"""Diagnostics of whole matrices in float64, from what they are defined to be: the tests' oracle."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.algorithm.reference import ReferenceMatrix
from megatron_dion.optimizer.diagnostics import ENERGY_LEVELS, MatrixDiagnostics


@dataclass(frozen=True)
class DenseDiagnostics:
    """What one step of a whole matrix was; shares are cumulative, of ||B||_F^2."""

    captured: float
    stable_rank: float
    shares: Tensor
    update_rms: float
    update_norm: float
    momentum_norm: float

    def check(self, found: MatrixDiagnostics, tolerance: float) -> None:
        """Fails unless a measurement is this, up to rounding."""
        for name in ("captured", "stable_rank", "update_rms", "update_norm", "momentum_norm"):
            expected = pytest.approx(getattr(self, name), rel=tolerance)
            assert getattr(found, name) == expected, (found.name, name)
        assert len(found.energy_ranks) == len(ENERGY_LEVELS)
        for level, count in zip(ENERGY_LEVELS, found.energy_ranks, strict=True):
            if count is None:
                assert self.shares[-1] < level + tolerance, found.name
            else:
                assert self.shares[count - 1] > level - tolerance, found.name
                assert count == 1 or self.shares[count - 2] < level + tolerance, found.name


def step_and_measure(
    matrix: ReferenceMatrix, gradient: Tensor, lr: float, weight_decay: float, config: DionConfig
) -> DenseDiagnostics:
    """A step of the reference, measured with whole matrices and singular values."""
    before, b = matrix.weight, matrix.momentum + gradient.double()  # (m, n)
    p, _ = torch.linalg.qr(b.T @ matrix.right_factor)  # (n, r); signs do not matter
    captured = b @ p @ p.T  # (m, n)
    singular_values = torch.linalg.svdvals(b @ p)
    matrix.step(gradient, lr, weight_decay, config)
    update = (1 - lr * weight_decay) * before - matrix.weight
    return DenseDiagnostics(
        captured=float(captured.norm() / b.norm()),
        stable_rank=float((b.norm() / torch.linalg.matrix_norm(captured, 2)) ** 2),
        shares=singular_values.square().cumsum(0) / b.norm() ** 2,
        update_rms=float(update.square().mean().sqrt()),
        update_norm=float(torch.linalg.matrix_norm(update, 2)),
        momentum_norm=float(matrix.momentum.norm()),
    )
