"""One step of Dion for a set of matrices, of which this process may hold only blocks.

For one logical matrix W (m, n) with momentum M (m, n) and right factor Q (m, r):

    B = M + G
    P = orthonormalize(B^T Q)                        (n, r)
    R = B P                                          (m, r)
    M = B - (1 - mu) R P^T
    Q = R / (||R||_column + eps)
    W = (1 - lr wd) W - lr scale Q P^T

which is algorithm 1 of the Dion paper (arXiv 2504.05295) applied to W^T. Blocks are rectangles of
W that share no element. P is a sum over the blocks that share columns, R a sum over those that
share rows; an `Exchange` carries out these sums across processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.counter_random import signs
from megatron_dion.algorithm.orthonormalize import orthonormalize


@dataclass(frozen=True)
class Matrix:
    """A logical matrix: what Dion updates as one, however it is stored.

    Attributes:
        name: unique in the whole model and the same in every topology.
        rows: m, global.
        columns: n, global.
        rank: r.
    """

    name: str
    rows: int
    columns: int
    rank: int


@dataclass
class Block:
    """The tensors of one block, all of them views.

    Attributes:
        matrix: index of its matrix.
        weight: (rows, columns) of the master weight.
        momentum: (rows, columns); holds B between the start and the end of a step.
        right_factor: (rows, r).
        left_factor: (columns, r), the rows of P that belong to the block's columns. Blocks of
            a matrix that overlap in columns share this memory.
        projection: (rows, r), the rows of R.
        counts_rows: whether this process reports the norms of these rows: true for exactly one
            of the blocks that share a row.
    """

    matrix: int
    weight: Tensor
    momentum: Tensor
    right_factor: Tensor
    left_factor: Tensor
    projection: Tensor
    counts_rows: bool = True


class Exchange(Protocol):
    """The sums of a step that cross processes. All buffers belong to it and keep their place."""

    left: Tensor
    """1-D: the memory of all `left_factor`s of this process."""

    def sum_left(self) -> Sequence[tuple[int, Tensor]]:
        """Sums P over the processes; returns (matrix, P (n, r)) for those decided here."""

    def spread_left(self) -> None:
        """Brings the P that `sum_left` returned, overwritten in place, back into `left`."""

    def sum_rows(self) -> None:
        """Sums the `projection`s of rows whose columns lie on several processes."""

    def sum_norms(self, squares: Tensor) -> None:
        """Sums a 1-D tensor over all processes that hold blocks, in place."""


def dion_step(
    matrices: Sequence[Matrix],
    blocks: Sequence[Block],
    exchange: Exchange,
    config: DionConfig,
    step: int,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
) -> None:
    """Takes one step, in place, from blocks whose `momentum` already holds B = M + G.

    Args:
        matrices: all matrices of the set, the same list on every process of the exchange.
        blocks: what this process holds of them.
        exchange: connects the processes.
        config: hyperparameters.
        step: number of this step, for the random numbers.
        learning_rates: one for each block, before scaling by shape.
        weight_decays: one for each block.
    """
    _project_left(blocks, exchange.left)
    _orthonormalize_left(matrices, exchange.sum_left(), config, step)
    exchange.spread_left()
    for block in blocks:
        torch.mm(block.momentum, block.left_factor, out=block.projection)
    exchange.sum_rows()
    norms = _column_norms(matrices, blocks, exchange)
    for block, lr, weight_decay in zip(blocks, learning_rates, weight_decays, strict=True):
        scale = config.scale(matrices[block.matrix].rows, matrices[block.matrix].columns)
        _update(block, norms[block.matrix], config, lr * scale, 1 - lr * weight_decay)


def _project_left(blocks: Sequence[Block], left: Tensor) -> None:
    left.zero_()
    for block in blocks:
        block.left_factor.addmm_(block.momentum.T, block.right_factor)  # (columns, r)


def _orthonormalize_left(
    matrices: Sequence[Matrix],
    decided_here: Sequence[tuple[int, Tensor]],
    config: DionConfig,
    step: int,
) -> None:
    """Orthonormalizes in batches of equal shape; equal shapes stand side by side in the list."""
    for _, same_shape in groupby(decided_here, key=lambda item: item[1].shape):
        indices, factors = zip(*same_shape, strict=True)
        names = [matrices[index].name for index in indices]
        batch = torch.stack(factors)  # (batch, n, r)

        def sketch(rows: int, names: list[str] = names, batch: Tensor = batch) -> Tensor:
            columns = torch.arange(batch.shape[1], device=batch.device)
            return torch.stack(
                [signs(config.seed, f"{name}/sketch/{step}", columns, rows).T for name in names]
            )  # (batch, rows, n)

        result = orthonormalize(batch, config.orthonormalizer, sketch, config.oversample)
        torch._foreach_copy_(list(factors), list(result.unbind()))


def _column_norms(
    matrices: Sequence[Matrix], blocks: Sequence[Block], exchange: Exchange
) -> tuple[Tensor, ...]:
    """Norms of the columns of each matrix's R, each (r,) float64.

    float64 holds the square of any float32, so no gradient is too large or too small, and makes
    the sum's order, which depends on the topology, invisible in float32.
    """
    ranks = [matrix.rank for matrix in matrices]
    squares = torch.zeros(sum(ranks), dtype=torch.float64, device=exchange.left.device)
    by_matrix = squares.split(ranks)
    for block in blocks:
        if block.counts_rows:
            by_matrix[block.matrix].add_(block.projection.double().square_().sum(dim=0))
    exchange.sum_norms(squares)
    return squares.sqrt_().split(ranks)


def _update(
    block: Block, norms: Tensor, config: DionConfig, scaled_lr: float, shrink: float
) -> None:
    right = block.projection * (1 / (norms + config.eps)).float()  # (rows, r)
    transposed = block.left_factor.T  # (r, columns)
    block.momentum.addmm_(block.projection, transposed, alpha=config.momentum - 1)
    block.weight.addmm_(right, transposed, beta=shrink, alpha=-scaled_lr)
    # A column without any gradient would otherwise lose its direction for ever.
    block.right_factor.copy_(torch.where(norms > 0, right, block.right_factor))
