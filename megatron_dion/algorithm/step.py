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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

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


class Batch(NamedTuple):
    """What lies at equal distances in memory."""

    members: list[int]  # n of them, by their numbers in a list
    tensors: list[Tensor]  # all of it, (n, *shape) each


_BATCH_NUMBERS = 1 << 25
"""Numbers that are copied together, of several blocks; 128 MiB."""

IN_FLIGHT = 2
"""Steps under way at a time in `interleave`."""


@dataclass(repr=False)  # the memory of some tensors may be away
class Block:
    """The tensors of k rectangles of equal shape at equal distances in memory, all of them views.

    They are the rectangles of one matrix, whose rows a fused weight interleaves with those of
    others, or one of each of several matrices, such as gate and up projection. They have the same
    columns; "rows" are those of one of them. c is 1 for one matrix, else k.
    """

    matrices: tuple[int, ...]  # indices of its c matrices
    parameter: Tensor  # the one of the optimizer's `param_groups` of which the weight is a part
    weight: Tensor  # (k, rows, columns) of the master weight, float32
    total: Tensor  # (k, rows, columns) float32, holds B = M + G when a step begins
    momentum: Tensor  # (k, rows, columns), M between steps; may be `total`
    right_factor: Tensor  # (k, rows, r) float32, Q while P is computed; perhaps in `projection`
    stored_right: Tensor  # (k, rows, stored columns), Q between steps; may be `right_factor`
    stored_columns: slice  # which columns of Q these are
    left_factor: Tensor  # (c, columns, r), the rows of P of its columns; blocks share overlaps
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
    operands = [(b.total, b.right_factor, b.left_factor, b.projection) for b in blocks]
    batches = _batches(operands, blocks)
    _project_left(blocks, batches, config)
    sections = yield from exchange.sum_left()
    orthonormalize(sections, exchange.reduce_rows)
    yield from exchange.spread_left()
    _project_right(blocks, batches, config)
    yield from exchange.sum_right()
    exchange.clear_norms()
    _measure(blocks, batches, exchange, is_measured)
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


def _project_left(blocks: Sequence[Block], batches: Sequence[Batch], config: DionConfig) -> None:
    with matmul_precision(config.fp32_matmul_prec):
        for members, (total, right, left, _) in batches:
            rows = blocks[members[0]].multiplied
            _add_products(left, _narrow(total, rows, dim=2), _narrow(right, rows, dim=2))


def _project_right(blocks: Sequence[Block], batches: Sequence[Batch], config: DionConfig) -> None:
    with matmul_precision(config.fp32_matmul_prec):
        for members, (total, _, left, projection) in batches:
            rows = blocks[members[0]].multiplied
            part = _narrow(projection, rows, dim=2)  # (n, k, rows, r)
            if part is not projection:
                projection.zero_()
            lefts = left.expand(-1, total.shape[1], -1, -1)  # (n, k, columns, r)
            for each in _in_few(_narrow(total, rows, dim=2), lefts, part):
                torch.bmm(each[0], each[1], out=each[2])


def _add_products(left: Tensor, total: Tensor, right: Tensor) -> None:
    """Adds total^T right to left, of which a matrix of k rectangles has one.

    Args:
        left: (n, c, columns, r).
        total: (n, k, rows, columns).
        right: (n, k, rows, r).
    """
    if left.shape[1] == total.shape[1]:
        for into, rows, factors in _in_few(left, total, right):
            into.baddbmm_(rows.mT, factors)
    elif is_cpu(total):
        left[0, 0].addbmm_(total[0].mT, right[0])
    else:
        count = batch_size(len(total), total[0].numel())
        for into, rows, factors in zip(
            *(t.split(count) for t in (left, total, right)), strict=True
        ):
            into.squeeze(1).baddbmm_(rows.flatten(1, 2).mT, factors.flatten(1, 2))


def _in_few(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Parts (n, ...) or (k, ...) of tensors (n, k, ...), whichever are fewer."""
    dim = int(tensors[0].shape[0] > tensors[0].shape[1])
    return zip(*(tensor.unbind(dim) for tensor in tensors), strict=True)


def _measure(
    blocks: Sequence[Block], batches: Sequence[Batch], exchange: Exchange, is_measured: bool
) -> None:
    """Squared norms of this process's part of the columns of R, the rows of B and, if asked for, B.

    Those of R are float64: the order of a sum, which differs between topologies, does not show
    after rounding. Norms of rows are float32, which needs no copy of B.
    """
    counted = [block for block in blocks if block.counted.stop > block.counted.start]
    squares: dict[int, Tensor] = {}  # by matrix
    rows_of = [(_narrow(block.projection, block.counted, dim=1),) for block in counted]
    for members, (rows,) in _batches(rows_of, counted, _BATCH_NUMBERS):
        is_one = len(counted[members[0]].matrices) == 1
        sums = rows.double().square_().sum(dim=(1, 2) if is_one else 2)  # (n, c r)
        matrices = [k for i in members for k in counted[i].matrices]
        for matrix, square in zip(matrices, sums.view(-1, rows.shape[3]), strict=True):
            squares[matrix] = squares[matrix] + square if matrix in squares else square
    copy_all([exchange.column_squares[k] for k in squares], list(squares.values()))
    if exchange.has_residual and blocks:
        row_norms: list[Tensor] = []
        for members, (total, *_) in batches:
            rows = _narrow(total, blocks[members[0]].multiplied, dim=2)
            row_norms += torch.linalg.vector_norm(rows, dim=3)  # (k, rows) each
        order = [blocks[i] for members, _ in batches for i in members]
        row_squares = [block.multiplied_rows(block.row_squares) for block in order]
        copy_all(row_squares, row_norms)
        torch._foreach_mul_(row_squares, row_squares)
    if is_measured:
        for block in blocks:
            total = block.multiplied_rows(block.total)
            by_matrix = total.flatten(0, 1) if len(block.matrices) == 1 else total
            parts = by_matrix.view(len(block.matrices), -1, total.shape[2])
            norms = torch.linalg.vector_norm(parts, dim=(1, 2), dtype=torch.float64)
            for matrix, norm in zip(block.matrices, norms, strict=True):
                exchange.totals[matrix] += norm.square()


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
    lefts = [_clone_if(b.is_copied, b.left_factor) for b in blocks]  # (c, columns, r)
    rows = [(right, b.stored_right) for right, b in zip(projections, blocks, strict=True)]
    batches = _batches(rows, blocks, _BATCH_NUMBERS)
    order = [i for members, _ in batches for i in members]
    norms = torch.cat([exchange.column_squares[k] for i in order for k in blocks[i].matrices])
    norms.sqrt_()
    sizes = [(len(m), len(blocks[m[0]].matrices), 1, batch.shape[3]) for m, (batch, _) in batches]
    factors = views_in((norms + config.eps).reciprocal_().float(), sizes)
    # A column of R that is zero leaves its column of Q, which would otherwise be lost for ever.
    is_new = views_in(norms > 0, sizes)
    row_scales = _row_scales(blocks, batches, config) if exchange.has_residual else None
    with matmul_precision(config.fp32_matmul_prec):
        for index, (members, (batch, stored)) in enumerate(batches):  # (n, k, rows, r)
            outers = [lefts[i].mT.expand(batch.shape[1], -1, -1) for i in members]
            if row_scales is None:
                for i, projection, outer in zip(members, batch, outers, strict=True):
                    blocks[i].total.baddbmm_(projection, outer, alpha=config.momentum - 1)
            scales = row_scales[index] if row_scales else None
            part = blocks[members[0]].stored_columns
            directions = _store_right(batch, stored, part, factors[index], is_new[index], scales)
            for n, (i, outer) in enumerate(zip(members, outers, strict=True)):
                block, lr = blocks[i], learning_rates[i]
                length, decay = lr * block.scale, lr * weight_decays[i]
                block.weight.baddbmm_(directions[n], outer, beta=1 - decay, alpha=-length)
                if scales is not None:
                    block.weight.addcmul_(block.total, scales[n], value=-length)
    if exchange.has_residual:
        for _, (total,) in _batches([(block.total,) for block in blocks], blocks):
            total.mul_(config.momentum)
    rounded = [block for block in blocks if block.momentum is not block.total]
    copy_all([block.momentum for block in rounded], [block.total for block in rounded])


def _store_right(
    projection: Tensor,
    stored: Tensor,
    part: slice,
    factors: Tensor,
    is_new: Tensor,
    row_scales: Tensor | None,
) -> Tensor:
    """Stores the columns `part` of the new Q; returns Q, or Q - S R, (n, k, rows, r).

    Args:
        projection: R, in whose place the result is computed, (n, k, rows, r).
        stored: (n, k, rows, stored columns).
        part: which columns of Q are stored.
        factors: of the columns of R, which make Q of it, (n, c, 1, r).
        is_new: whether a column of Q changes, (n, c, 1, r).
        row_scales: S, (n, k, rows, 1), if weights move along the residual.
    """
    right = projection.mul_(factors) if row_scales is None else projection * factors
    rounded = right[..., part].to(stored.dtype)
    torch.where(is_new[..., part], rounded, stored, out=stored)
    if row_scales is None:
        return right
    return torch.addcmul(right, projection, row_scales, value=-1, out=projection)


def _row_scales(
    blocks: Sequence[Block], batches: Sequence[Batch], config: DionConfig
) -> list[Tensor]:
    """The diagonals of S, (n, k, rows, 1), from whole rows of R, (n, k, rows, r), by batch."""
    norms = [torch.linalg.vector_norm(rows, dim=3) for _, (rows, _) in batches]  # (n, k, rows)
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


def _kind(block: Block) -> tuple[Any, ...]:
    """The same for the blocks that layers have at the same place of a weight."""
    place = block.weight.storage_offset() - block.parameter.storage_offset()
    rows = (block.multiplied, block.counted)
    return len(block.matrices), int(place), *((part.start, part.stop) for part in rows)


def step_bytes(right: Mapping[tuple[int, Any], int], fused: Iterable[int]) -> int:
    """Bytes that `dion_step` takes beside those of the exchange and of P.

    Args:
        right: numbers of R by weight and shape of a rectangle; column norms are taken of a float64
            copy, by batch.
        fused: numbers of each matrix of which a fused weight interleaves the rows; a copy of B is
            what B^T Q is computed from, of several matrices at a time.
    """
    blocks = defaultdict[Any, list[int]](list)
    for (_, shape), numbers in right.items():
        blocks[shape].append(numbers)
    copies = [(8, len(alike), max(alike)) for alike in blocks.values()]
    copies += [(4, count, numbers) for numbers, count in Counter(fused).items()]
    return max((size * batch_size(n, each) * each for size, n, each in copies), default=0)


def batch_size(count: int, numbers: int) -> int:
    """How many of `count` blocks of so many numbers each are copied together."""
    return min(count, max(1, _BATCH_NUMBERS // numbers))


def _batches(
    rows: Sequence[tuple[Tensor, ...]], blocks: Sequence[Block], limit: float = math.inf
) -> list[Batch]:
    """Makes one tensor (n, *shape) of those of one kind and shape at equal distances in memory.

    On a CPU each is alone: it is still in the cache when it is used again.

    Args:
        rows: the tensors of each block; in a batch each of them is at equal distances.
        blocks: the blocks.
        limit: numbers of a batch of several blocks, at most, in the first tensor of each.
    """
    if rows and is_cpu(rows[0][0]):
        return [Batch([i], [t.unsqueeze(0) for t in each]) for i, each in enumerate(rows)]
    offsets = [[int(tensor.storage_offset()) for tensor in each] for each in rows]
    runs: dict[Any, list[list[int]]] = defaultdict(list)
    steps: dict[int, list[int]] = {}  # by the first member of a run, its distances
    for i in sorted(range(len(rows)), key=lambda i: offsets[i]):
        alike = [(t.untyped_storage().data_ptr(), t.shape, t.stride()) for t in rows[i]]
        run = runs[(_kind(blocks[i]), *alike)]
        last = run[-1] if run else []
        before = offsets[last[-1]] if last else offsets[i]
        step = [here - there for here, there in zip(offsets[i], before, strict=True)]
        is_even = last and min(step) > 0 and steps.setdefault(last[0], step) == step
        if is_even and (len(last) + 1) * rows[i][0].numel() <= limit:
            last.append(i)
        else:
            run.append([i])
    members = [each for run in runs.values() for each in run]
    return [Batch(each, _joined([rows[i] for i in each])) for each in members]


def _joined(rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    joined = []
    for first, *_, last in ((*tensors, tensors[-1]) for tensors in zip(*rows, strict=True)):
        distance = (last.storage_offset() - first.storage_offset()) // max(1, len(rows) - 1)
        joined.append(first.as_strided((len(rows), *first.shape), (distance, *first.stride())))
    return joined


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


def _narrow(tensor: Tensor, part: slice, dim: int) -> Tensor:
    """A slice of a dimension; the tensor itself where the slice is all of it, as it mostly is."""
    length = part.stop - part.start
    return tensor if length == tensor.shape[dim] else tensor.narrow(dim, part.start, length)
