"""Orthonormal columns for P: Cholesky QR, made twice.

The result is the Q of the QR decomposition P = Q U whose upper triangular U has a positive diagonal
(Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, ETNA 44, 2015). Both passes add a small shift to the
Gram matrix, so that a Cholesky factor always exists (Fukaya et al., SIAM J. Sci. Comput. 42, 2020).
Nothing depends on the values of a tensor, so a GPU is never waited for.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

NOISE = 1e-6
"""A column of P is rounding noise if what the columns before it leave of it is below this share of
the longest column of its matrix."""

_UNIT_ROUNDOFF = 2.0**-24
_LEAST_BLOCK = 64
_BLOCKS = 8


class RowSums(Protocol):
    """Combines, in place, what the processes have that hold the other rows of the same P."""

    def add(self, tensor: Tensor) -> None:
        """Adds up a tensor over these processes."""

    def max(self, tensor: Tensor) -> None:
        """Takes the elementwise maximum over these processes."""


class AllRowsHere:
    """The `RowSums` of a process that holds all rows."""

    def add(self, tensor: Tensor) -> None:
        pass

    def max(self, tensor: Tensor) -> None:
        pass


def orthonormalize(batches: Sequence[Tensor], sums: RowSums) -> None:
    """Orthonormalizes the columns of every P, in place.

    A column that depends linearly on those before it, as far as float32 can tell, becomes zero. So
    the result is finite for every finite P, its other columns are orthonormal, and rounding, which
    differs between topologies, does not decide its direction.

    A pass turns a singular value x of P, with columns of unit length, into
    x sqrt((1 + s) / (x^2 + s)), s = `_shift(r)`. So one stays one and no value exceeds 1 + s / 2.
    The first pass turns a residual x of a column into about x / sqrt(s), which the second one
    compares with the shift: a column is dependent if x < 4 s, or if x is `NOISE`.

    Args:
        batches: each (batch, rows, r) float32, the rows of P that this process holds; r may exceed
            the rows. Processes that share matrices pass the same batches, with rows of their own.
        sums: combines the rows of all processes.
    """
    if not batches:
        return
    scales = _scale_columns(batches, sums)
    residuals: list[Tensor] = []
    grams, packed = _gram_matrices(batches)
    sums.add(packed)
    for p, gram, scale in zip(batches, grams, scales, strict=True):
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # (batch, r)
        divisors = torch.where(norms > 0, norms, 1.0)
        gram /= divisors.unsqueeze(1) * divisors.unsqueeze(2)
        upper = _shifted_factor(gram)
        lengths = norms * (scale / scale.amax(dim=1, keepdim=True))
        lengths /= lengths.amax(dim=1, keepdim=True).clamp(min=1)  # of the longest column
        residuals.append(lengths * upper.diagonal(dim1=1, dim2=2))
        _divide(p, upper * divisors.unsqueeze(1), torch.ones_like(norms))
    grams, packed = _gram_matrices(batches)
    sums.add(packed)
    for p, gram, residual in zip(batches, grams, residuals, strict=True):
        upper = _shifted_factor(gram)
        # The square of a diagonal entry is a squared residual plus the shift.
        shift = _shift(gram.shape[1])
        squares = upper.diagonal(dim1=1, dim2=2).square() - shift  # (batch, r)
        is_independent = (squares > 15 * shift) & (residual.square() * squares > NOISE**2)
        _divide(p, upper, is_independent.to(p.dtype))


def orthonormalize_flops(rows: int, rank: int) -> int:
    """Operations for `rows` rows of a P (n, r): Gram matrix and division, twice each."""
    blocks = -(-rank // _block_size(rank))
    share = (blocks + 1) / (2 * blocks)  # of the full product: triangles by blocks
    return int(2 * (2 * 2 * rows * rank**2 * share + rank**3 / 3))


def _scale_columns(batches: Sequence[Tensor], sums: RowSums) -> list[Tensor]:
    """Makes the largest entry of every column one, so that no square overflows or vanishes.

    Returns:
        The largest entries, one where they were zero, each (batch, r).
    """
    packed = torch.cat(
        [
            p.abs().amax(dim=1).flatten() if p.shape[1] else p.new_zeros(len(p) * p.shape[2])
            for p in batches
        ]
    )
    sums.max(packed)
    sizes = [len(p) * p.shape[2] for p in batches]
    scales = [
        scale.view(len(p), -1)
        for p, scale in zip(batches, torch.where(packed > 0, packed, 1.0).split(sizes), strict=True)
    ]
    for p, scale in zip(batches, scales, strict=True):
        p /= scale.unsqueeze(1)
    return scales


def _gram_matrices(batches: Iterable[Tensor]) -> tuple[list[Tensor], Tensor]:
    """P^T P of each P, (batch, r, r), and the memory of all of them.

    Only the upper triangles of blocks are computed; a Cholesky factorization reads no more.
    """
    sizes = [len(p) * p.shape[2] ** 2 for p in batches]
    packed = torch.zeros(sum(sizes), device=next(iter(batches)).device)
    grams = []
    for p, memory in zip(batches, packed.split(sizes), strict=True):
        rank = p.shape[2]
        gram = memory.view(len(p), rank, rank)
        for start, stop in _blocks(rank):
            gram[:, :stop, start:stop] = p[:, :, :stop].mT @ p[:, :, start:stop]
        grams.append(gram)
    return grams, packed


def _shift(rank: int) -> float:
    """Above the rounding of a Gram matrix (r, r) of unit columns, in the spectral norm."""
    return (100 + 8 * rank**0.5) * _UNIT_ROUNDOFF


def _shifted_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factors (batch, r, r) of (G + s I) / (1 + s)."""
    shift = _shift(gram.shape[1])
    gram.diagonal(dim1=1, dim2=2).add_(shift)
    upper: Tensor = torch.linalg.cholesky_ex(gram / (1 + shift), upper=True).L
    return upper


def _divide(p: Tensor, upper: Tensor, factors: Tensor) -> None:
    """P = P U^-1 diag(factors), in place, block of columns by block of columns.

    Args:
        p: (batch, rows, r).
        upper: U, upper triangular, (batch, r, r).
        factors: (batch, r).
    """
    for start, stop in _blocks(p.shape[2]):
        block = p[:, :, start:stop]
        if start:
            block.baddbmm_(p[:, :, :start], upper[:, :start, start:stop], alpha=-1)
        inverse = torch.linalg.solve_triangular(
            upper[:, start:stop, start:stop],
            torch.diag_embed(factors[:, start:stop]),
            upper=True,
        )
        block.copy_(block @ inverse)


def _blocks(rank: int) -> list[tuple[int, int]]:
    size = _block_size(rank)
    return [(start, min(start + size, rank)) for start in range(0, rank, size)]


def _block_size(rank: int) -> int:
    return max(_LEAST_BLOCK, -(-rank // _BLOCKS))
