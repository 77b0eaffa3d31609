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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.exchange import Exchange, Steps
from megatron_dion.algorithm.orthonormalize import is_cpu, orthonormalize
from megatron_dion.algorithm.products import matmul_precision

FLOOR = 1 / 32
"""A row of E that is shorter than about FLOOR ||B_i|| moves W by less than other rows do.

So short a row may be rounding noise. With products in float32, rounding changes ||E_i||^2 by about
1e-6 ||B_i||^2; the relative error of s_i is then at most about 1e-6 / FLOOR^2 = 1e-3. With products
in TF32 it is 5e-4 in place of 1e-6. docs/residual.md says how far noise moves a row."""

Batches = Sequence[tuple[list[int], Tensor]]
"""What lies at equal distances in memory: its numbers in a list, and all of it as one tensor."""

_BATCH_NUMBERS = 1 << 23
"""Numbers from which on a batch is complete, 32 MiB."""

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
    multiplied: slice  # rows with which this process multiplies; others have copies of the rest
    counted: slice  # rows of R whose norms this process counts: each row is counted by one process
    is_copied: bool = False  # whether other processes hold the same elements, to be kept equal

    def multiplied_rows(self, tensor: Tensor) -> Tensor:
        """The rows `multiplied` of a tensor (k, rows, ...) of the block."""
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
    orthonormalize(sections, exchange.reduce_rows)
    yield from exchange.spread_left()
    _project_right(blocks, config)
    yield from exchange.sum_right()
    exchange.clear_norms()
    _measure(blocks, exchange, is_measured)
    yield from exchange.sum_norms()
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
    """Squared norms of this process's part of the columns of R, the rows of B and, if asked for, B.

    Those of R are float64: the order of a sum, which differs between topologies, does not show
    after rounding. Norms of rows are float32, which needs no copy of B.
    """
    counted = [block for block in blocks if block.counted.stop > block.counted.start]
    squares: dict[int, Tensor] = {}  # by matrix
    for members, rows in _batches([_narrow(b.projection, b.counted, dim=1) for b in counted]):
        sums = rows.double().square_().sum(dim=(1, 2))  # (n, r)
        for matrix, square in zip((counted[i].matrix for i in members), sums, strict=True):
            squares[matrix] = squares[matrix] + square if matrix in squares else square
    copy_all([exchange.column_squares[k] for k in squares], list(squares.values()))
    totals = [block.multiplied_rows(block.total) for block in blocks]
    if exchange.has_residual and blocks:
        row_squares = [block.multiplied_rows(block.row_squares) for block in blocks]
        copy_all(row_squares, [torch.linalg.vector_norm(total, dim=2) for total in totals])
        torch._foreach_mul_(row_squares, row_squares)
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
    batches = _batches(projections)
    members = [i for each, _ in batches for i in each]
    norms = torch.cat([exchange.column_squares[blocks[i].matrix] for i in members]).sqrt_()
    sizes = [(len(batch), 1, 1, batch.shape[3]) for _, batch in batches]
    factors = views_in((norms + config.eps).reciprocal_().float(), sizes)
    # A column of R that is zero leaves its column of Q, which would otherwise be lost for ever.
    is_new = views_in(norms > 0, sizes)
    row_scales = _row_scales(blocks, batches, config) if exchange.has_residual else None
    with matmul_precision(config.fp32_matmul_prec):
        for index, (members, batch) in enumerate(batches):  # (n, k, rows, r)
            outers = [_repeated(lefts[i].T, batch.shape[1]) for i in members]
            if row_scales is None:
                for i, projection, outer in zip(members, batch, outers, strict=True):
                    blocks[i].total.baddbmm_(projection, outer, alpha=config.momentum - 1)
                directions = rights = batch.mul_(factors[index])  # R becomes Q in its place
            else:
                scales = row_scales[index]  # S, (n, k, rows, 1)
                rights = batch * factors[index]
                directions = torch.addcmul(rights, batch, scales, value=-1)  # Q - S R
            for n, (i, outer) in enumerate(zip(members, outers, strict=True)):
                block, lr = blocks[i], learning_rates[i]
                length, decay = lr * block.scale, lr * weight_decays[i]
                block.weight.baddbmm_(directions[n], outer, beta=1 - decay, alpha=-length)
                if row_scales is not None:
                    block.weight.addcmul_(block.total, scales[n], value=-length)
                    block.total *= config.momentum
                stored, part = block.stored_right, block.stored_columns
                right = rights[n, ..., part].to(stored.dtype)
                torch.where(is_new[index][n, ..., part], right, stored, out=stored)
    rounded = [block for block in blocks if block.momentum is not block.total]
    copy_all([block.momentum for block in rounded], [block.total for block in rounded])


def _row_scales(blocks: Sequence[Block], batches: Batches, config: DionConfig) -> list[Tensor]:
    """The diagonals of S, (n, k, rows, 1), from whole rows of R, (n, k, rows, r), by batch."""
    norms = [torch.linalg.vector_norm(rows, dim=3) for _, rows in batches]  # (n, k, rows)
    captured = torch.cat([norm.view(-1) for norm in norms]).double().square_()
    squares = torch.cat([blocks[i].row_squares.reshape(-1) for each, _ in batches for i in each])
    residual = (squares - captured).clamp_(min=0).add_(squares, alpha=FLOOR**2).sqrt_()
    # A row whose norm is beyond float32's range, 1e-22 to 1e19, does not move along its residual.
    residual.nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(squares == 0, math.inf)
    scales = views_in(
        (residual + config.eps).reciprocal_().float(), [(*norm.shape, 1) for norm in norms]
    )
    by_block = [each for scale in scales for each in scale]
    lengths = [blocks[i].residual_row for each, _ in batches for i in each]
    torch._foreach_mul_(by_block, lengths)
    return scales


def _batches(tensors: Sequence[Tensor]) -> Batches:
    """Which tensors are of one shape and at equal distances, and these as one, (n, *shape).

    On a CPU each is alone: it is still in the cache when it is used again.
    """
    offsets = [int(tensor.storage_offset()) for tensor in tensors]
    runs: dict[Any, list[list[int]]] = {}
    for i in sorted(range(len(tensors)), key=lambda i: offsets[i]):
        tensor = tensors[i]
        alike = tensor.untyped_storage().data_ptr(), tensor.shape, tensor.stride()
        run = runs.setdefault(i if is_cpu(tensor) else alike, [[]])
        last = [offsets[k] for k in (*run[-1][:2], *run[-1][-1:], i)]
        is_even = len(run[-1]) < 2 or last[1] - last[0] == last[3] - last[2]
        if is_even and len(run[-1]) * tensor.numel() < _BATCH_NUMBERS:
            run[-1].append(i)
        else:
            run.append([i])
    batches = []
    for each in (each for run in runs.values() for each in run):
        first, second = tensors[each[0]], each[1] if len(each) > 1 else each[0]
        size, stride = (
            (len(each), *first.shape),
            (offsets[second] - offsets[each[0]], *first.stride()),
        )
        batches.append((each, first.as_strided(size, stride)))
    return batches


def views_in(buffer: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of consecutive parts of a 1-D buffer with given shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = buffer[: sum(sizes)].split(sizes) if sizes else ()
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


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
    """A slice of a dimension; the tensor itself where the slice is all of it, as it mostly is."""
    length = part.stop - part.start
    return tensor if length == tensor.shape[dim] else tensor.narrow(dim, part.start, length)
