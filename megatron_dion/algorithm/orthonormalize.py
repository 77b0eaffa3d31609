"""Orthonormal bases of the column spaces of tall matrices, batched.

Every method returns the same thing up to rounding: the Q of the QR decomposition P = Q U whose
upper triangular U has a positive diagonal. So the choice of a method, or a fall back to another,
does not change which run it is.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dion.algorithm.counter_random import signs

Sketch = Callable[[int], Tensor]
"""Given a number of rows k, random test matrices (batch, k, n) of independent signs."""


def orthonormalize(p: Tensor, method: str, sketch: Sketch, oversample: float) -> Tensor:
    """Orthonormalizes the columns of each matrix of a batch.

    Where the columns are linearly dependent (all zero, say), the result is completed by some
    orthonormal columns: it is finite and orthonormal for every finite input.

    Args:
        p: (batch, n, r) float32 with r <= n.
        method: `rcqr`: randomized Cholesky QR: the triangle of a sketch of P preconditions one
            Cholesky QR (Higgins et al., arXiv 2309.05868); `cqr`: Cholesky QR, twice (Yamamoto
            et al. 2015); `qr`: Householder.
        sketch: the random matrices of `rcqr`.
        oversample: rows of the sketch per column of P.

    Returns:
        (batch, n, r), orthonormal columns. A matrix for which a Cholesky method breaks down is done
        by Householder QR instead.
    """
    p = _with_unit_columns(p)
    if method == "qr":
        return _householder(p)
    if method == "rcqr":
        # The few extra rows keep the sketch of a handful of columns from being nearly singular.
        rows = max(math.ceil(oversample * p.shape[2]), p.shape[2] + 8)
        candidate = _cholesky_qr(_preconditioned(p, sketch(rows)))
    elif method == "cqr":
        candidate = _cholesky_qr(_cholesky_qr(p))
    else:
        raise ValueError(f"unknown orthonormalizer {method!r}")
    return _replace_broken(candidate, p)


def _with_unit_columns(p: Tensor) -> Tensor:
    """Scales columns to a largest entry of one, so that squares neither overflow nor vanish.

    The scaling is absorbed by U: Q does not change.
    """
    largest = p.abs().amax(dim=1, keepdim=True)  # (batch, 1, r)
    return p / torch.where(largest > 0, largest, 1.0)


def _preconditioned(p: Tensor, test: Tensor) -> Tensor:
    triangle = torch.linalg.qr(test @ p, mode="r").R  # (batch, r, r)
    diagonal = triangle.diagonal(dim1=1, dim2=2)
    triangle = triangle * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-1)
    return torch.linalg.solve_triangular(triangle, p, upper=True, left=False)  # (batch, n, r)


def _cholesky_qr(p: Tensor) -> Tensor:
    """One Cholesky QR; a matrix whose Gram matrix has no factor comes back as NaN."""
    factor, info = torch.linalg.cholesky_ex(p.mT @ p, upper=True)
    factor = torch.where((info == 0).view(-1, 1, 1), factor, math.nan)
    return torch.linalg.solve_triangular(factor, p, upper=True, left=False)


def _householder(p: Tensor) -> Tensor:
    q, u = torch.linalg.qr(p)
    diagonal = u.diagonal(dim1=-2, dim2=-1)
    return q * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)


def _replace_broken(candidate: Tensor, p: Tensor) -> Tensor:
    """Does by Householder QR what a Cholesky method left less than orthonormal.

    A nearly singular Gram matrix may well have a Cholesky factor, so the result itself is tested:
    applied to a few vectors of signs, Q^T Q - I must vanish up to rounding.
    """
    rank = p.shape[2]
    probes = signs(0, "probe", torch.arange(rank, device=p.device), 4)  # (r, 4)
    error = (candidate.mT @ (candidate @ probes) - probes).abs().amax(dim=(1, 2))  # (batch,)
    # The host waits for the device here, once for each shape.
    broken = (~(error < 5e-6 * math.sqrt(rank))).nonzero().flatten()
    if broken.numel():
        candidate[broken] = _householder(p[broken])
    return candidate
