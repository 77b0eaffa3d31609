"""One step of Dion for a set of matrices, of which this process may hold only blocks.

For one logical matrix W (m, n) with momentum M (m, n) and right factor Q (m, r):

    B = M + G                                        (m, n)
    P = orthonormalize(B^T Q)                        (n, r)
    R = B P                                          (m, r)
    M = B - (1 - mu) R P^T                           (m, n)
    Q = R / (||R||_column + eps)                     (m, r)
    W = (1 - lr wd) W - lr scale Q P^T               (m, n)

which is algorithm 1 of the Dion paper (arXiv 2504.05295) applied to W^T. With `residual="rows"`, W
moves also along E = B - R P^T, every row of it by the same length, and there is no error feedback:

    M = mu B                                         (m, n)
    W = (1 - lr wd) W - lr scale (Q P^T + S E)       (m, n)
    s_i = sqrt((min(m, n) - r) / m) / (sqrt(||E_i||^2 + (FLOOR ||B_i||)^2) + eps)

E is not formed: Q P^T + S E = (Q - S R) P^T + S B, and ||E_i||^2 = ||B_i||^2 - ||R_i||^2.

Blocks are rectangles of W that share no element. P is a sum over the blocks that share columns, R a
sum over those that share rows; an `Exchange` carries out these sums across processes.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.exchange import Exchange, Steps
from megatron_dion.algorithm.orthonormalize import orthonormalize
from megatron_dion.algorithm.products import matmul_precision

FLOOR = 1 / 32
"""Where less than about this share of a row of B is left in E, the row moves by less than others.

P is orthonormal to 1e-6 or so, and so uncertain is ||E_i||^2 / ||B_i||^2 in float32. With the floor
that changes s_i by 1e-6 / FLOOR^2 at most, and what rounding leaves in E, 1e-6 ||B_i||, moves a row
by less than 1e-4 of the others' length."""

IN_FLIGHT = 2
"""Steps under way at a time in `interleave`."""


@dataclass
class Block:
    """The tensors of one or more rectangles of a matrix, all of them views.

    A fused weight interleaves the rows of its matrices, so a block is k rectangles at equal
    distances in memory. They have the same columns; "rows" are those of one of them.
    """

    matrix: int  # index of its matrix
    parameter: Tensor  # the one of the optimizer's `param_groups` of which the weight is a part
    weight: Tensor  # (k, rows, columns) of the master weight, float32
    total: Tensor  # (k, rows, columns) float32, holds B = M + G when a step begins
    momentum: Tensor  # (k, rows, columns), M between steps; may be `total`
    right_factor: Tensor  # (k, rows, r) float32, Q while P is computed; perhaps in `projection`
    stored_right: Tensor  # (k, rows, stored columns), Q between steps; may be `right_factor`
    stored_columns: slice  # which columns of Q these are
    left_factor: Tensor  # (columns, r), the rows of P of its columns; blocks share overlaps
    projection: Tensor  # (k, rows, r), the rows of R
    row_squares: Tensor  # (k, rows) float64, for ||B_i||^2 of whole rows; (k, 0) without residual
    scale: float  # factor on the learning rate
    residual_row: float  # length by which a row of the residual moves, before the scale
    multiplied: slice  # rows of which this process computes products; another one does the others
    counted: slice  # rows of R whose norms this process counts: each row is counted by one process
    is_copied: bool = False  # whether other processes hold the same elements, to be kept equal

    def multiplied_rows(self, tensor: Tensor) -> Tensor:
        """The multiplied rows of one of the block's (k, rows, ...)."""
        return _narrow(tensor, self.multiplied, dim=1)


def dion_step(
    blocks: Sequence[Block],
    exchange: Exchange,
    config: DionConfig,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    is_measured: bool = False,
) -> Steps:
    """Takes one step, in place, from blocks whose `total` already holds B = M + G.

    The phases, with shapes for one matrix, all of it on one process:

        load Q              right_factor (m, r)
        project to P        left_factor = B^T Q (n, r)
        sum P               over the processes that hold rows, to one owner
        orthonormalize P    (n, r)
        spread P            from the owner
        project to R        projection = B P (m, r)
        sum R               over the processes that hold columns
        measure             column norms of R (r,), and row norms of B (m,) for the residual
        update M, W, Q      (m, n), (m, n), (m, r)

    A step is a generator: it yields whenever it waits for other processes, so that another step,
    of other matrices, can compute meanwhile (`interleave`).

    Args:
        blocks: what this process holds of the matrices that are stepped.
        exchange: connects the processes.
        config: hyperparameters.
        learning_rates: one for each block, before scaling by shape.
        weight_decays: one for each block.
        is_measured: whether the exchange's `totals` are wanted; the same on every process.
    """
    _load_right(blocks)
    yield from exchange.gather_right()
    exchange.clear_left()
    _project_left(blocks, config)
    sections = yield from exchange.sum_left()
    orthonormalize(sections, exchange.row_sums)
    yield from exchange.spread_left()
    _project_right(blocks, config)
    yield from exchange.sum_right()
    exchange.clear_numbers()
    _measure(blocks, exchange, is_measured)
    yield from exchange.sum_numbers()
    _update(blocks, exchange, config, learning_rates, weight_decays)


def interleave(steps: Iterable[Steps]) -> None:
    """Takes steps in turns, each computing while another waits.

    `IN_FLIGHT` of them are under way at a time, and the next begins where one has ended. Every
    process must do it with the same steps in the same order.
    """
    upcoming = iter(steps)
    waiting = list(islice(upcoming, IN_FLIGHT))
    while waiting:
        step = waiting.pop(0)
        try:
            next(step)
            waiting.append(step)
        except StopIteration:
            waiting += islice(upcoming, 1)


def _load_right(blocks: Sequence[Block]) -> None:
    for block in blocks:
        if block.right_factor is not block.stored_right:
            block.right_factor[..., block.stored_columns].copy_(block.stored_right)


def _project_left(blocks: Sequence[Block], config: DionConfig) -> None:
    with matmul_precision(config.fp32_matmul_prec):
        for block in blocks:
            total = block.multiplied_rows(block.total)
            right = block.multiplied_rows(block.right_factor)
            block.left_factor.addbmm_(total.mT, right)  # (columns, r), the sum over k in it


def _project_right(blocks: Sequence[Block], config: DionConfig) -> None:
    with matmul_precision(config.fp32_matmul_prec):
        for block in blocks:
            projection = block.multiplied_rows(block.projection)  # (k, rows, r)
            if projection is not block.projection:
                block.projection.zero_()
            total = block.multiplied_rows(block.total)
            torch.bmm(total, _repeated(block.left_factor, len(total)), out=projection)


def _measure(blocks: Sequence[Block], exchange: Exchange, is_measured: bool) -> None:
    """Squares of what this process has of the columns of R, the rows of B and, if asked for, B.

    Those of R are float64, in which the order of a sum, which differs between topologies, does not
    show after rounding. Norms of rows are float32, which needs no copy of B.
    """
    counted = [block for block in blocks if block.counted.stop > block.counted.start]
    squares = [
        _narrow(block.projection, block.counted, dim=1).double().square_().sum(dim=(0, 1))
        for block in counted
    ]
    _add_all([exchange.column_squares[block.matrix] for block in counted], squares)
    totals = [block.multiplied_rows(block.total) for block in blocks]
    if exchange.has_residual:
        row_squares = [block.multiplied_rows(block.row_squares) for block in blocks]
        copy_all(row_squares, [torch.linalg.vector_norm(total, dim=2) for total in totals])
        exchange.square_rows()
    if is_measured:
        for block, total in zip(blocks, totals, strict=True):
            norm = torch.linalg.vector_norm(total, dtype=torch.float64)
            exchange.totals[block.matrix] += norm.square()


def _update(
    blocks: Sequence[Block],
    exchange: Exchange,
    config: DionConfig,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
) -> None:
    if not blocks:
        return
    # Other processes have copies of these rows, elsewhere in memory. Products may depend on how
    # operands are aligned, in their last bit: clones start where an allocation does.
    projections = [_clone_if(b.is_copied, b.projection) for b in blocks]  # (k, rows, r)
    lefts = [_clone_if(b.is_copied, b.left_factor) for b in blocks]  # (columns, r)
    matrices = list({block.matrix for block in blocks})
    norms = torch.cat([exchange.column_squares[k] for k in matrices]).sqrt_()
    ranks = [len(exchange.column_squares[k]) for k in matrices]
    factors = dict(zip(matrices, (1 / (norms + config.eps)).float().split(ranks), strict=True))
    # A column of R that is zero leaves its column of Q, which would otherwise be lost for ever.
    is_new = dict(zip(matrices, (norms > 0).split(ranks), strict=True))
    row_scales = _row_scales(blocks, projections, config) if exchange.has_residual else None
    with matmul_precision(config.fp32_matmul_prec):
        for i, (block, right, left) in enumerate(zip(blocks, projections, lefts, strict=True)):
            outer = _repeated(left.T, len(right))  # (k, r, columns)
            length, decay = learning_rates[i] * block.scale, learning_rates[i] * weight_decays[i]
            if row_scales is None:
                block.total.baddbmm_(right, outer, alpha=config.momentum - 1)
                direction = right.mul_(factors[block.matrix])  # R becomes Q in its place
            else:
                scales, projection = row_scales[i], right  # S, (k, rows, 1)
                right = projection * factors[block.matrix]
                direction = torch.addcmul(right, projection, scales, value=-1)  # Q - S R
            block.weight.baddbmm_(direction, outer, beta=1 - decay, alpha=-length)
            if row_scales is not None:
                block.weight.addcmul_(block.total, scales, value=-length)
                block.total *= config.momentum
            stored, part = block.stored_right, block.stored_columns
            new_right = right[..., part].to(stored.dtype)
            torch.where(is_new[block.matrix][part], new_right, stored, out=stored)
    rounded = [block for block in blocks if block.momentum is not block.total]
    copy_all([block.momentum for block in rounded], [block.total for block in rounded])


def _row_scales(
    blocks: Sequence[Block], projections: Sequence[Tensor], config: DionConfig
) -> list[Tensor]:
    """The diagonals of S, each (k, rows, 1), from whole rows of R, each (k, rows, r)."""
    norms = [torch.linalg.vector_norm(projection, dim=2) for projection in projections]  # (k, rows)
    captured = torch.cat([norm.view(-1) for norm in norms]).double().square_()
    squares = torch.cat([block.row_squares.reshape(-1) for block in blocks])
    residual = (squares - captured).clamp_(min=0).add_(squares, alpha=FLOOR**2).sqrt_()
    # A row whose norm is beyond float32's range, about 1e19, does not move along its residual.
    residual.nan_to_num_(nan=math.inf, posinf=math.inf)
    flat = (1 / (residual + config.eps)).float().split([norm.numel() for norm in norms])
    scales = [each.view(*norm.shape, 1) for each, norm in zip(flat, norms, strict=True)]
    torch._foreach_mul_(scales, [block.residual_row for block in blocks])
    return scales


def _add_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Adds tensor by tensor, in few calls, of which none has a target twice."""
    calls: defaultdict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    times: Counter[int] = Counter()
    for target, source in zip(targets, sources, strict=True):
        calls[times[id(target)]].append((target, source))
        times[id(target)] += 1
    for pairs in calls.values():
        torch._foreach_add_(*zip(*pairs, strict=True))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensor by tensor, in one call; there may be none."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _clone_if(condition: bool, tensor: Tensor) -> Tensor:
    return tensor.clone() if condition else tensor


def _repeated(factor: Tensor, count: int) -> Tensor:
    """A view (count, ...) of the same factor for each of several rectangles."""
    # For one rectangle, `expand` would cost another view.
    return factor.unsqueeze(0) if count == 1 else factor.expand(count, -1, -1)


def _narrow(tensor: Tensor, part: slice, dim: int) -> Tensor:
    """What a slice takes of a dimension; mostly that is all, which need not cost a view."""
    length = part.stop - part.start
    return tensor if length == tensor.shape[dim] else tensor.narrow(dim, part.start, length)
