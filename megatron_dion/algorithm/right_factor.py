"""What turns R = B P into the next right factor Q: column norms, or an orthonormalization.

Both need one small sum over the rows of R, wherever they are: of squares (r,), or of products
(r, r). These are float64, which holds the square of any float32, so no gradient is too large or too
small, and makes the sum's order, which depends on the topology, invisible in float32.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

DAMPING = 1e-6
"""Directions of R smaller than this share of its largest column are damped, since float32 leaves
little but rounding there, and orthonormalizing would make an update of it."""


def squared_norms(rows: Tensor) -> Tensor:
    """Of the columns of (..., rows, r): (r,) float64."""
    return rows.double().square_().sum(dim=tuple(range(rows.dim() - 1)))


def inner_products(rows: Tensor) -> Tensor:
    """Of every two columns of (..., rows, r): (r, r) float64."""
    rows = rows.double().flatten(end_dim=-2)
    return rows.mT @ rows


def to_unit_columns(norms: Tensor, eps: float) -> Tensor:
    """The factors (r,) float32 that divide R's columns by their norms (r,) float64 plus eps."""
    return (1 / (norms + eps)).float()


def to_orthonormal_columns(grams: Sequence[Tensor], eps: float) -> list[Tensor]:
    """For each Gram matrix (r, r) float64 of an R the C (r, r) float32 that makes R C orthonormal.

    R C is the Q of the QR decomposition with a positive diagonal of [R / s; DAMPING I], the rows of
    R of it, where s is R's largest column norm plus eps. So no singular value exceeds one by more
    than rounding (a few percent where R is rank deficient), and what is lost in R's rounding, or
    smaller than eps, tends to zero. Batched by shape; equal shapes must
    stand side by side.
    """
    found: list[Tensor] = []
    for _, same_shape in groupby(grams, key=lambda gram: gram.shape):
        gram = torch.stack(list(same_shape))  # (batch, r, r)
        largest = gram.diagonal(dim1=1, dim2=2).amax(dim=1).sqrt() + eps  # (batch,)
        scale = (1 / largest).view(-1, 1, 1)
        unit = gram * scale * scale
        unit.diagonal(dim1=1, dim2=2).add_(DAMPING**2)
        upper = torch.linalg.cholesky(unit, upper=True)
        identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(upper, identity, upper=True)  # (batch, r, r)
        found += (scale * inverse).float().unbind()
    return found
