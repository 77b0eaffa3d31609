"""Dion on whole matrices in float64, one at a time: what every other path is tested against.

Written to be compared with the paper line by line (applied to the transpose, docs/design.md says
why), and on purpose sharing nothing with `step` but the definition of the first right factor.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.counter_random import normal


@dataclass
class ReferenceMatrix:
    """One logical matrix and its state, float64.

    Attributes:
        name: global name, the source of its random numbers.
        weight: (m, n).
        momentum: (m, n).
        right_factor: (m, r).
    """

    name: str
    weight: Tensor
    momentum: Tensor
    right_factor: Tensor

    @classmethod
    def start(cls, name: str, weight: Tensor, config: DionConfig) -> "ReferenceMatrix":
        """The matrix before its first step; `weight` (m, n) of any dtype."""
        m, n = weight.shape
        rank = config.rank(m, n)
        first = normal(config.seed, f"{name}/right_factor", torch.arange(m), rank) / math.sqrt(m)
        weight = weight.detach().double().clone()
        return cls(name, weight, torch.zeros_like(weight), first.double())

    def step(self, gradient: Tensor, lr: float, weight_decay: float, config: DionConfig) -> None:
        """One step of Dion (paper, algorithm 1) with `gradient` (m, n)."""
        m, n = self.weight.shape
        b = self.momentum + gradient.double()  # (m, n)
        p = orthonormal_columns(b.T @ self.right_factor)  # (n, r)
        r = b @ p  # (m, r)
        norms = r.norm(dim=0)  # (r,)
        q = r / (norms + config.eps)  # (m, r)
        if config.residual == "none":
            self.momentum = b - (1 - config.momentum) * r @ p.T
            update = q @ p.T
        else:
            self.momentum = config.momentum * b
            update = q @ p.T + _equal_rows(b, b - r @ p.T, config)
        self.weight = (1 - lr * weight_decay) * self.weight - lr * config.scale(m, n) * update
        # A column without any gradient keeps its direction.
        self.right_factor = torch.where(norms > 0, q, self.right_factor)


def _equal_rows(b: Tensor, residual: Tensor, config: DionConfig) -> Tensor:
    """Rows of the residual (m, n) of B with the length that the missing directions would have."""
    m, n = b.shape
    length = math.sqrt((min(m, n) - config.rank(m, n)) / m)
    size = b.norm(dim=1, keepdim=True)
    damped = torch.sqrt(residual.norm(dim=1, keepdim=True) ** 2 + (size / 32) ** 2) + config.eps
    return torch.where(size < 1e19, length / damped * residual, 0.0)


def orthonormal_columns(p: Tensor) -> Tensor:
    """Gram-Schmidt on the columns of P (n, r), made twice; a dependent column becomes zero.

    Float32 tells a residual from rounding down to some share of the column's own norm and of the
    longest column's: the two numbers below.
    """
    longest = float(p.norm(dim=0).max())
    q = torch.zeros_like(p)
    for j in range(p.shape[1]):
        length = float(p[:, j].norm())
        residual = p[:, j]
        for _ in range(2):
            residual = residual - q @ (q.T @ residual)
        if residual.norm() > max(4e-5 * length, 1e-6 * longest):
            q[:, j] = residual / residual.norm()
    return q
