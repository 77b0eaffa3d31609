"""Orthonormal columns for P: Cholesky QR, made twice.

The result is the Q of the QR decomposition P = Q U whose upper triangular U has a positive diagonal
(Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, ETNA 44, 2015). Both passes add a small shift to the
Gram matrix, so that a Cholesky factor always exists (Fukaya et al., SIAM J. Sci. Comput. 42, 2020).
Nothing depends on the values of a tensor, so a GPU is never waited for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

NOISE = 1e-6
"""A column of P is rounding noise if its part orthogonal to the columns before it is shorter than
this fraction of the longest column."""

_UNIT_ROUNDOFF = 2.0**-24
_LEAST_BLOCK = 64
_BLOCKS = 8


Reduce = Callable[[Tensor, Any], None]
"""Combines a tensor, in place and by a `ReduceOp`, over the processes that hold rows of a P."""


def orthonormalize(batches: Sequence[Tensor], reduce: Reduce) -> None:
    """Orthonormalizes the columns of every P, in place.

    A column that depends linearly on those before it, as far as float32 can tell, becomes zero. So
    the result is finite for every finite P, its other columns are orthonormal, and rounding, which
    differs between topologies, does not decide its direction.

    A pass turns a singular value x of P, with columns of unit length, into x / sqrt(x^2 + s),
    s = `_shift`, so no value exceeds one. The residual of a column is what the columns before it
    leave of it. The first pass turns a residual x into about x / sqrt(s), which the second pass
    compares with the shift: a column is dependent if x < 4 s, or if x is `NOISE`. In the end every
    other column gets length one.

    Args:
        batches: each (batch, rows, r) float32, the rows of P that this process holds; r may exceed
            the rows. Processes that share matrices pass the same batches, with rows of their own.
        reduce: combines the processes.
    """
    if not batches:
        return
    _scale(batches, reduce)
    residuals: list[Tensor] = []
    sizes = [len(p) * p.shape[2] ** 2 for p in batches]
    packed = torch.empty(sum(sizes), device=batches[0].device)
    grams = [
        memory.view(len(p), p.shape[2], p.shape[2])
        for p, memory in zip(batches, packed.split(sizes), strict=True)
    ]
    _multiply(batches, grams)
    reduce(packed, ReduceOp.SUM)
    for p, gram in zip(batches, grams, strict=True):
        squares = gram.diagonal(dim1=1, dim2=2).clone()  # (batch, r), of the lengths of columns
        lengths = torch.where(squares > 0, squares, 1.0)
        shift = _shift(gram, lengths)
        residual = _divide(p, gram, shift, lengths)
        residuals.append(residual / squares.amax(dim=1, keepdim=True).sqrt())
    _multiply(batches, grams)
    reduce(packed, ReduceOp.SUM)
    for p, gram, residual in zip(batches, grams, residuals, strict=True):
        ones = torch.ones_like(residual)
        shift = _shift(gram, ones)
        diagonal = _divide(p, gram, shift, ones)
        squares = diagonal.square() - shift  # of the residuals
        is_independent = (squares > 15 * shift) & (residual.square() * squares > NOISE**2)
        lengthened = diagonal / torch.maximum(squares, shift).sqrt()  # by what the shift took
        p *= torch.where(is_independent, lengthened, 0.0).unsqueeze(1)


def orthonormalize_flops(rows: int, rank: int) -> int:
    """Operations for `rows` rows of a P (n, r): Gram matrix and division, twice each."""
    blocks = len(_blocks(rank, torch.device("cuda")))
    fraction = (blocks + 1) / (2 * blocks)  # of the full product: triangles by blocks
    return int(2 * (2 * 2 * rows * rank**2 * fraction + rank**3 / 3))


def _scale(batches: Sequence[Tensor], reduce: Reduce) -> None:
    """Makes the largest entry of every P one, so that no square overflows.

    Squares that underflow then belong to columns that are noise.
    """
    packed = torch.cat(
        [p.abs().amax((1, 2)) if p.numel() else p.new_zeros(len(p)) for p in batches]
    )
    reduce(packed, ReduceOp.MAX)
    scales = torch.where(packed > 0, packed, 1.0).split([len(p) for p in batches])
    for p, scale in zip(batches, scales, strict=True):
        p /= scale.view(-1, 1, 1)


def _multiply(batches: Sequence[Tensor], grams: Sequence[Tensor]) -> None:
    """G = P^T P; of G (batch, r, r) only the upper triangle of blocks."""
    for p, gram in zip(batches, grams, strict=True):
        for start, stop in _blocks(p.shape[2], p.device):
            block = gram[:, start:stop, start:]
            block.baddbmm_(p[:, :, start:stop].mT, p[:, :, start:], beta=0)


def _shift(gram: Tensor, squares: Tensor) -> Tensor:
    """The shift (batch, 1), above the rounding of Gram matrices of columns of unit length.

    The rounding grows with the norm of the upper triangle, which is about sqrt(r) for orthonormal
    columns and r for parallel ones.

    Args:
        gram: (batch, r, r).
        squares: (batch, r), by which the squared lengths of columns are divided.
    """
    weights = (1 / squares).unsqueeze(2)  # (batch, r, 1)
    square = torch.zeros_like(weights[:, :1])
    for start, stop in _blocks(gram.shape[1], gram.device):  # they fit in a CPU's cache
        entries = gram[:, start:stop, start:].square()
        square += weights[:, start:stop].mT @ (entries @ weights[:, start:])
    return (16 + 6 * square.squeeze(2).sqrt()) * _UNIT_ROUNDOFF


def _divide(p: Tensor, gram: Tensor, shift: Tensor, squares: Tensor) -> Tensor:
    """P = P U^-1, in place, with the Cholesky factor U of G + s diag(squares).

    The factorization and the division take turns, for one half of the columns and then for the
    other. (torch's factorization of a large matrix takes longer on a CPU than the products with P.)

    Args:
        p: (batch, rows, r).
        gram: G, of which the upper triangle is overwritten with U, (batch, r, r).
        shift: s, (batch, 1).
        squares: (batch, r).

    Returns:
        The diagonal of U, (batch, r).
    """
    gram.diagonal(dim1=1, dim2=2).add_(shift * squares)
    _divide_columns(p, gram, 0, gram.shape[1])
    return gram.diagonal(dim1=1, dim2=2)


def _divide_columns(p: Tensor, gram: Tensor, start: int, stop: int) -> None:
    """Computes rows start:stop of U and columns start:stop of P U^-1, both in place.

    The contributions of the columns before `start` have been subtracted.
    """
    size = stop - start
    if size > _block_size(gram.shape[1], p.device):
        middle = start + size // 2
        _divide_columns(p, gram, start, middle)
        upper = gram[:, start:middle, middle:]
        gram[:, middle:stop, middle:].baddbmm_(upper[:, :, : stop - middle].mT, upper, alpha=-1)
        p[:, :, middle:stop].baddbmm_(p[:, :, start:middle], upper[:, :, : stop - middle], alpha=-1)
        _divide_columns(p, gram, middle, stop)
        return
    rows, columns = gram[:, start:stop, start:], p[:, :, start:stop]
    upper = torch.linalg.cholesky_ex(rows[:, :, :size], upper=True).L
    identity = torch.eye(size, device=p.device)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    rows[:, :, :size] = upper
    rows[:, :, size:] = inverse.mT @ rows[:, :, size:]
    columns.copy_(columns @ inverse)


def _blocks(rank: int, device: torch.device) -> list[tuple[int, int]]:
    size = _block_size(rank, device)
    return [(start, min(start + size, rank)) for start in range(0, rank, size)]


def _block_size(rank: int, device: torch.device) -> int:
    """Columns of a block. A block on the diagonal of G is computed whole, a triangle would do.

    On a GPU, where few large calls are fast, a matrix has at most `_BLOCKS` blocks.
    """
    return _LEAST_BLOCK if device.type == "cpu" else max(_LEAST_BLOCK, -(-rank // _BLOCKS))
