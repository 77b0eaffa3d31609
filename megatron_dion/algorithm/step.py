"""One step of Dion for a set of matrices, of which this process may hold only blocks.

For one logical matrix W (m, n) with momentum M (m, n) and right factor Q (m, r):

    B = M + G
    P = orthonormalize(B^T Q)                        (n, r)
    R = B P                                          (m, r)
    M = B - (1 - mu) R P^T
    Q = R / (||R||_column + eps)                     or orthonormalize(R)
    W = (1 - lr wd) W - lr scale Q P^T

which is algorithm 1 of the Dion paper (arXiv 2504.05295) applied to W^T. Blocks are rectangles of
W that share no element. P is a sum over the blocks that share columns, R a sum over those that
share rows; an `Exchange` carries out these sums across processes.

A step is a generator: it yields whenever it waits for other processes, so that another step, of
other matrices, can compute meanwhile (`interleave`).
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.exchange import Exchange, Matrix, Section
from megatron_dion.algorithm.foreach import copy_all
from megatron_dion.algorithm.left_factor import orthonormalize_left
from megatron_dion.algorithm.products import products_in
from megatron_dion.algorithm.right_factor import (
    inner_products,
    squared_norms,
    to_orthonormal_columns,
    to_unit_columns,
)

IN_FLIGHT = 2
"""Steps under way at a time; what bounds their memory counts on it."""


@dataclass
class Block:
    """The tensors of a block, all of them views.

    Fused weights interleave the rows of their matrices, so a block is k rectangles at equal
    distances in memory. They have the same columns; "rows" are those of one of them.

    Attributes:
        matrix: index of its matrix.
        weight: (k, rows, columns) of the master weight, float32.
        total: (k, rows, columns) float32, holds B = M + G when a step begins.
        momentum: (k, rows, columns), M between steps; may be `total`.
        right_factor: (k, rows, r) float32, Q while P is computed; may be the memory of
            `projection`.
        kept_right: (k, rows, columns of Q), what this process keeps of Q between steps; may be
            `right_factor`.
        kept_columns: which columns of Q these are.
        left_factor: (columns, r), the rows of P that belong to the block's columns. Blocks of
            a matrix that overlap in columns share this memory.
        projection: (k, rows, r), the rows of R.
        multiplied: the rows for which this process computes products with B; of the others, which
            it holds as well, another process does.
        counted: the rows of R whose norms this process reports. Every row of a matrix is counted
            by one process.
        is_copied: whether other processes hold the same elements, and must keep them equal.
    """

    matrix: int
    weight: Tensor
    total: Tensor
    momentum: Tensor
    right_factor: Tensor
    kept_right: Tensor
    kept_columns: slice
    left_factor: Tensor
    projection: Tensor
    multiplied: slice
    counted: slice
    is_copied: bool = False

    def multiplied_rows(self, tensor: Tensor) -> Tensor:
        """Those rows of one of the block's (k, rows, ...), or itself where they are all of them."""
        return _part(tensor, self.multiplied, dim=1)

    def counted_projection(self) -> Tensor:
        """The rows of R whose norms this process reports, (k, rows, r)."""
        return _part(self.projection, self.counted, dim=1)


class Observer:
    """Is shown a step on its way, and changes nothing of it. This one does not look."""

    def orthonormalize(
        self, sections: Sequence[Section], steps: Generator[None, None, int]
    ) -> Generator[None, None, int]:
        """Runs what orthonormalizes these sections of P in place; returns what it returns."""
        return steps

    def see_projections(self, blocks: Sequence[Block]) -> None:
        """Looks at R, complete, in the `projection`s."""


def interleave(steps: Iterable[Generator[None, None, int]]) -> int:
    """Takes steps in turns, each computing while another waits; returns the sum of results.

    Two are under way at a time, and the next begins where one has ended. Every process must do it
    with the same steps in the same order.
    """
    upcoming = iter(steps)
    waiting = list(islice(upcoming, IN_FLIGHT))
    total = 0
    while waiting:
        step = waiting.pop(0)
        try:
            next(step)
            waiting.append(step)
        except StopIteration as end:
            total += end.value
            waiting += islice(upcoming, 1)
    return total


NOBODY = Observer()
"""For steps that nobody watches."""


def dion_step(
    matrices: Sequence[Matrix],
    blocks: Sequence[Block],
    exchange: Exchange,
    config: DionConfig,
    step: int,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    observer: Observer = NOBODY,
) -> Generator[None, None, int]:
    """Takes one step, in place, from blocks whose `total` already holds B = M + G.

    Args:
        matrices: all matrices, the same list on every process of the exchange.
        blocks: what this process holds of those that are stepped.
        exchange: connects the processes.
        config: hyperparameters.
        step: number of this step, for the random numbers.
        learning_rates: one for each block, before scaling by shape.
        weight_decays: one for each block.
        observer: is shown P and R.

    Returns:
        How often this process fell back to Householder QR.
    """
    _load_right(blocks)
    yield from exchange.gather_right()
    exchange.clear_left()
    _project_left(blocks, config)
    sections = yield from exchange.sum_left()
    orthonormalized = orthonormalize_left(matrices, sections, exchange, config, step)
    fallbacks = yield from observer.orthonormalize(sections, orthonormalized)
    yield from exchange.spread_left()
    _project_right(blocks, config)
    yield from exchange.sum_rows()
    observer.see_projections(blocks)
    to_factors = _orthonormal_factors if config.right_factor == "orth" else _unit_factors
    factors = yield from to_factors(matrices, blocks, exchange, config)
    scales = [config.scale(matrices[b.matrix].rows, matrices[b.matrix].columns) for b in blocks]
    rates = [lr * scale for lr, scale in zip(learning_rates, scales, strict=True)]
    shrinks = [1 - lr * decay for lr, decay in zip(learning_rates, weight_decays, strict=True)]
    to_right = [factors[block.matrix] for block in blocks]
    _update(blocks, to_right, config.momentum, rates, shrinks, config.fp32_matmul_prec)
    return fallbacks


def _load_right(blocks: Sequence[Block]) -> None:
    for block in blocks:
        if block.right_factor is not block.kept_right:
            block.right_factor[..., block.kept_columns].copy_(block.kept_right)


def _project_left(blocks: Sequence[Block], config: DionConfig) -> None:
    with products_in(config.fp32_matmul_prec) as products:
        for block in blocks:
            total = block.multiplied_rows(block.total)
            right = block.multiplied_rows(block.right_factor)
            products.add_left(block.left_factor, total, right)


def _project_right(blocks: Sequence[Block], config: DionConfig) -> None:
    with products_in(config.fp32_matmul_prec) as products:
        for block in blocks:
            multiplied = block.multiplied_rows(block.projection)
            if multiplied is not block.projection:
                block.projection.zero_()
            total = block.multiplied_rows(block.total)
            products.set_right(multiplied, total, block.left_factor)


@dataclass(frozen=True)
class _ToRight:
    """How R becomes Q: R times `factor`, where the column has a direction.

    Attributes:
        factor: (r,) for each column, or (r, r).
        dead: (r,) float32, one where R's column is zero.
    """

    factor: Tensor
    dead: Tensor


def _unit_factors(
    matrices: Sequence[Matrix],
    blocks: Sequence[Block],
    exchange: Exchange,
    config: DionConfig,
) -> Generator[None, None, dict[int, _ToRight]]:
    held = _held(matrices, blocks)
    ranks = [matrices[k].rank for k in held]
    squares = torch.zeros(sum(ranks), dtype=torch.float64, device=exchange.device)
    by_matrix = dict(zip(held, squares.split(ranks), strict=True))
    for block in blocks:
        by_matrix[block.matrix].add_(squared_norms(block.counted_projection()))
    yield from exchange.sum_right([(k, part.unsqueeze(0)) for k, part in by_matrix.items()])
    norms = squares.sqrt_()
    factors = to_unit_columns(norms, config.eps).split(ranks)
    dead = (norms == 0).float().split(ranks)
    return {k: _ToRight(*found) for k, *found in zip(held, factors, dead, strict=True)}


def _orthonormal_factors(
    matrices: Sequence[Matrix],
    blocks: Sequence[Block],
    exchange: Exchange,
    config: DionConfig,
) -> Generator[None, None, dict[int, _ToRight]]:
    grams: dict[int, Tensor] = {}
    for block in blocks:
        gram = inner_products(block.counted_projection())
        grams[block.matrix] = grams[block.matrix] + gram if block.matrix in grams else gram
    held = _held(matrices, blocks)
    yield from exchange.sum_right([(k, grams[k]) for k in held])
    factors = to_orthonormal_columns([grams[k] for k in held], config.eps)
    return {
        k: _ToRight(factor, (grams[k].diagonal() == 0).float())
        for k, factor in zip(held, factors, strict=True)
    }


def _held(matrices: Sequence[Matrix], blocks: Sequence[Block]) -> list[int]:
    """Matrices of which this process has blocks, those of equal rank side by side."""
    return sorted({block.matrix for block in blocks}, key=lambda k: (matrices[k].rank, k))


def _update(
    blocks: Sequence[Block],
    to_right: Sequence[_ToRight],
    momentum: float,
    scaled_lrs: Sequence[float],
    shrinks: Sequence[float],
    precision: str,
) -> None:
    # Other processes have copies of these rows, elsewhere in memory. Products may depend on how
    # operands are aligned, in their last bit: clones start where an allocation does.
    projections = [_clone_if(b.is_copied, b.projection) for b in blocks]  # (k, rows, r)
    lefts = [_clone_if(b.is_copied, b.left_factor) for b in blocks]  # (columns, r)
    with products_in(precision) as products:
        for block, projection, left in zip(blocks, projections, lefts, strict=True):
            products.add_outer(block.total, projection, left, beta=1, alpha=momentum - 1)
    rounded = [block for block in blocks if block.momentum is not block.total]
    copy_all([block.momentum for block in rounded], [block.total for block in rounded])
    rights = _rights(projections, [found.factor for found in to_right])
    steps = zip(blocks, rights, lefts, scaled_lrs, shrinks, strict=True)
    with products_in(precision) as products:
        for block, right, left, scaled_lr, shrink in steps:
            products.add_outer(block.weight, right, left, beta=shrink, alpha=-scaled_lr)
    _keep_right(blocks, rights, [found.dead for found in to_right])


def _clone_if(condition: bool, tensor: Tensor) -> Tensor:
    return tensor.clone() if condition else tensor


def _rights(projections: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """The new Q, (k, rows, r) each; with factors for columns in the memory of R."""
    if all(factor.dim() == 1 for factor in factors):
        if projections:
            torch._foreach_mul_(projections, factors)
        return projections
    # Copies of rows are elsewhere on other processes: see _update.
    return [p.clone() @ factor.clone() for p, factor in zip(projections, factors, strict=True)]


def _keep_right(blocks: Sequence[Block], rights: Sequence[Tensor], dead: Sequence[Tensor]) -> None:
    """Stores Q; a column without any gradient would otherwise lose its direction for ever."""
    if not blocks:
        return
    kept = [block.kept_right for block in blocks]
    columns = [block.kept_columns for block in blocks]
    torch._foreach_mul_(kept, [_part(d, c) for d, c in zip(dead, columns, strict=True)])
    torch._foreach_add_(kept, [_part(r, c) for r, c in zip(rights, columns, strict=True)])


def _part(tensor: Tensor, chosen: slice, dim: int = -1) -> Tensor:
    """What a slice takes of a dimension; mostly that is all, which need not cost a view."""
    start, stop = chosen.start, chosen.stop
    return tensor if stop - start == tensor.shape[dim] else tensor.narrow(dim, start, stop - start)
