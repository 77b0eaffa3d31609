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

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Protocol

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.counter_random import signs
from megatron_dion.algorithm.orthonormalize import (
    PartialSums,
    factor,
    orthonormalize,
    orthonormalize_part,
    pack,
    summed_rows,
    unpack,
)
from megatron_dion.algorithm.products import products_in
from megatron_dion.algorithm.right_factor import (
    inner_products,
    squared_norms,
    to_orthonormal_columns,
    to_unit_columns,
)

Steps = Generator[None, None, None]
"""Yields while a collective is under way."""

_CACHE_BYTES = 1 << 20
"""Of the sections of P that a CPU orthonormalizes together: they stay in a core's cache."""

IN_FLIGHT = 2
"""Steps under way at a time; what bounds their memory counts on it."""


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


@dataclass(frozen=True)
class Section:
    """Consecutive rows of the P of a matrix, summed and orthonormalized by this process.

    Attributes:
        matrix: index of the matrix.
        start: first row.
        values: (rows, r).
    """

    matrix: int
    start: int
    values: Tensor


@dataclass(frozen=True)
class Stack:
    """The packed triangles of all sections of the P of a matrix, which this process joins.

    Attributes:
        matrix: index of the matrix.
        rows: of P in each section.
        triangles: of each section (`packed_rows`, r).
    """

    matrix: int
    rows: tuple[int, ...]
    triangles: tuple[Tensor, ...]


class Exchange(Protocol):
    """The sums of a step that cross processes. All buffers belong to it and keep their place."""

    device: torch.device
    """Where the matrices are."""
    has_parts: bool
    """Whether the P of any matrix is orthonormalized by sums over several processes."""
    merged: frozenset[int]
    """Matrices whose P is orthonormalized by triangles of its sections, on several processes."""

    def clear_left(self) -> None:
        """Sets all `left_factor`s of this process to zero."""

    def gather_right(self) -> Steps:
        """Completes the `right_factor`s, of which processes keep different columns."""

    def sum_left(self) -> Generator[None, None, list[Section]]:
        """Sums P over the processes; returns the sections of which this one is in charge."""

    def sum_parts(self, phase: int, parts: Sequence[tuple[int, Tensor]]) -> Steps:
        """Sums (matrix, (k, r)) over the processes in charge of its sections, in place."""

    def agree(self, broken: Collection[int]) -> Generator[None, None, list[int]]:
        """The matrices that any process found to be broken, of those done by sums."""

    def merge(
        self,
        matrices: Collection[int],
        triangles: Sequence[tuple[int, Tensor]],
        join: Callable[[Sequence[Stack]], int],
    ) -> Generator[None, None, int]:
        """Brings packed triangles of sections together, and what becomes of them back, in place.

        Args:
            matrices: whose sections, the same on every process.
            triangles: (matrix, (`packed_rows`, r)) of each section of this process.
            join: overwrites all that this process has to join; what it returns is returned.
        """

    def spread_left(self) -> Steps:
        """Brings what `sum_left` returned, overwritten in place, into the `left_factor`s."""

    def sum_rows(self) -> Steps:
        """Sums the `projection`s of rows whose columns lie on several processes."""

    def sum_norms(self, squares: Tensor) -> Steps:
        """Sums squared norms of all members over the processes that hold blocks, in place."""

    def sum_grams(self, grams: Sequence[tuple[int, Tensor]]) -> Steps:
        """Sums (matrix, (r, r)) over the processes that hold blocks of the matrix, in place."""


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
    members: Sequence[int],
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
        members: which of them are stepped here, in the order in which the exchange sums their
            norms, the same on every process.
        blocks: what this process holds of them.
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
    orthonormalized = _orthonormalize_left(matrices, sections, exchange, config, step)
    fallbacks = yield from observer.orthonormalize(sections, orthonormalized)
    yield from exchange.spread_left()
    _project_right(blocks, config)
    yield from exchange.sum_rows()
    observer.see_projections(blocks)
    if config.right_factor == "orth":
        factors = yield from _orthonormal_factors(matrices, blocks, exchange, config)
    else:
        factors = yield from _unit_factors(matrices, members, blocks, exchange, config)
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


def _orthonormalize_left(
    matrices: Sequence[Matrix],
    sections: Sequence[Section],
    exchange: Exchange,
    config: DionConfig,
    step: int,
) -> Generator[None, None, int]:
    """Orthonormalizes in place, in batches of equal shape; returns the number of fallbacks."""
    fallbacks = 0
    merged: list[list[Section]] = []
    parts: list[_Part] = []
    for batch in _batches(matrices, sections, exchange):
        if batch[0].matrix in exchange.merged:
            merged.append(batch)
            continue
        stacked = torch.stack([section.values for section in batch])  # (batch, rows, r)
        sketch = _sketch_of([section.start for section in batch], stacked, config, step)
        if stacked.shape[1] == matrices[batch[0].matrix].columns:
            result, failures = orthonormalize(
                stacked, config.orthonormalizer, sketch, config.oversample
            )
            fallbacks += failures
            _store(batch, result)
        else:
            sums = orthonormalize_part(stacked, config.orthonormalizer, sketch, config.oversample)
            parts.append(_Part(batch, sums))
    if exchange.has_parts:
        fallbacks += yield from _orthonormalize_parts(parts, exchange, config, step)
    if exchange.merged:
        fallbacks += yield from _merge(exchange.merged, merged, exchange, config, step)
    return fallbacks


def _batches(
    matrices: Sequence[Matrix], sections: Sequence[Section], exchange: Exchange
) -> Iterator[list[Section]]:
    """Sections of equal shape; on a CPU no more of them than stay in its cache."""
    for _, alike in groupby(sections, key=lambda section: _likeness(matrices, section, exchange)):
        batch = list(alike)
        most = len(batch)
        if exchange.device.type == "cpu":
            most = max(1, _CACHE_BYTES // batch[0].values.nbytes)
        for first in range(0, len(batch), most):
            yield batch[first : first + most]


def _merge(
    members: Collection[int],
    batches: Sequence[Sequence[Section]],
    exchange: Exchange,
    config: DionConfig,
    step: int,
) -> Generator[None, None, int]:
    """Orthonormalizes P in sections (TSQR), in place; returns the number of fallbacks.

    With P_i = Q_i R_i for each section, and the R_i one below the other = S R, P's rows are
    Q_i S_i. The S_i = R_i R^-1 are upper trapezoidal as the R_i are. So they are where columns are
    dependent: an elementary reflector, made of column j, has no entry below row j of any S_i.

    Args:
        members: matrices to which the sections belong, the same on every process.
        batches: sections of this process, those of a batch of the same shape.
        exchange: connects the processes.
        config: hyperparameters.
        step: number of this step.
    """
    fallbacks = 0
    bases: list[Tensor] = []
    triangles: list[tuple[int, Tensor]] = []
    for batch in batches:
        stacked = torch.stack([section.values for section in batch])  # (batch, rows, r)
        sketch = _sketch_of([section.start for section in batch], stacked, config, step)
        base, triangle, failures = factor(
            stacked, config.orthonormalizer, sketch, config.oversample
        )
        fallbacks += failures
        bases.append(base)  # (batch, rows, k)
        triangles += zip((section.matrix for section in batch), pack(triangle), strict=True)

    def join(stacks: Sequence[Stack]) -> int:
        return _join(stacks, config, step)

    fallbacks += yield from exchange.merge(members, triangles, join)
    returned = iter(triangles)
    for batch, base in zip(batches, bases, strict=True):
        packed = torch.stack([triangle for _, triangle in islice(returned, len(batch))])
        _store(batch, base @ unpack(packed, base.shape[2]))
    return fallbacks


def _join(stacks: Sequence[Stack], config: DionConfig, step: int) -> int:
    """Orthonormalizes triangles of sections, in place; returns the number of fallbacks."""
    fallbacks = 0

    def likeness(stack: Stack) -> tuple[tuple[int, ...], int]:
        return stack.rows, stack.triangles[0].shape[1]

    for (rows, rank), alike in groupby(sorted(stacks, key=likeness), key=likeness):
        sections = list(zip(*(stack.triangles for stack in alike), strict=True))
        heights = [min(count, rank) for count in rows]
        stacked = torch.cat(
            [unpack(torch.stack(each), k) for each, k in zip(sections, heights, strict=True)], dim=1
        )  # (batch, sum of heights, r)
        sketch = _sketch_of([0] * len(stacked), stacked, config, step)
        result, failures = orthonormalize(
            stacked, config.orthonormalizer, sketch, config.oversample
        )
        fallbacks += failures
        for each, part in zip(sections, result.split(heights, dim=1), strict=True):
            _copy(list(each), list(pack(part)))
    return fallbacks


@dataclass
class _Part:
    sections: list[Section]
    sums: PartialSums


def _orthonormalize_parts(
    parts: Sequence[_Part], exchange: Exchange, config: DionConfig, step: int
) -> Generator[None, None, int]:
    """All parts in step with each other, and with all processes, also those without any part."""
    partial = [next(part.sums) for part in parts]
    last = len(summed_rows(config.orthonormalizer, 1, config.oversample)) - 1
    broken: list[list[Section]] = []
    for phase in range(last + 1):
        here = [
            (section.matrix, values)
            for part, batch in zip(parts, partial, strict=True)
            for section, values in zip(part.sections, batch, strict=True)
        ]
        yield from exchange.sum_parts(phase, here)
        if phase < last:
            partial = [part.sums.send(sums) for part, sums in zip(parts, partial, strict=True)]
    for part, sums in zip(parts, partial, strict=True):
        result, failed = _result(part.sums, sums)
        by_failure: tuple[list[Section], list[Section]] = ([], [])
        for section, has_failed in zip(part.sections, failed.tolist(), strict=True):
            by_failure[has_failed].append(section)
        _store(by_failure[False], result[~failed])
        broken += [by_failure[True]] if by_failure[True] else []
    mine = [section.matrix for batch in broken for section in batch]
    agreed = yield from exchange.agree(mine)
    if agreed:
        by_householder = replace(config, orthonormalizer="qr")
        yield from _merge(agreed, broken, exchange, by_householder, step)
    return len(mine)


def _result(sums: PartialSums, last: Tensor) -> tuple[Tensor, Tensor]:
    try:
        sums.send(last)
    except StopIteration as end:
        return end.value
    raise AssertionError("a part asks for more sums than it has phases")


def _likeness(
    matrices: Sequence[Matrix], section: Section, exchange: Exchange
) -> tuple[bool, bool, torch.Size]:
    """Sections with the same one are done together; such stand side by side in the list."""
    whole = section.values.shape[0] == matrices[section.matrix].columns
    return section.matrix in exchange.merged, whole, section.values.shape


def _sketch_of(
    starts: Sequence[int], stacked: Tensor, config: DionConfig, step: int
) -> Callable[[int], Tensor]:
    """For a batch (batch, count, r) of rows from some starts on."""

    def sketch(rows: int) -> Tensor:
        """The same for all matrices: it has to be independent of P, not of other sketches."""
        own = torch.arange(stacked.shape[1], device=stacked.device)
        purpose = f"sketch/{step}"
        by_start = {s: signs(config.seed, purpose, s + own, rows).T for s in sorted(set(starts))}
        if len(by_start) == 1:
            return by_start[starts[0]].unsqueeze(0)  # (1, rows, count)
        return torch.stack([by_start[start] for start in starts])  # (batch, rows, count)

    return sketch


def _store(sections: Sequence[Section], results: Tensor) -> None:
    _copy([section.values for section in sections], list(results.unbind()))


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
    members: Sequence[int],
    blocks: Sequence[Block],
    exchange: Exchange,
    config: DionConfig,
) -> Generator[None, None, dict[int, _ToRight]]:
    ranks = [matrices[member].rank for member in members]
    squares = torch.zeros(sum(ranks), dtype=torch.float64, device=exchange.device)
    by_matrix = dict(zip(members, squares.split(ranks), strict=True))
    for block in blocks:
        by_matrix[block.matrix].add_(squared_norms(block.counted_projection()))
    yield from exchange.sum_norms(squares)
    norms = squares.sqrt_()
    factors = to_unit_columns(norms, config.eps).split(ranks)
    dead = (norms == 0).float().split(ranks)
    return {k: _ToRight(*found) for k, *found in zip(members, factors, dead, strict=True)}


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
    held = sorted(grams, key=lambda k: (matrices[k].rank, k))
    yield from exchange.sum_grams([(k, grams[k]) for k in held])
    factors = to_orthonormal_columns([grams[k] for k in held], config.eps)
    return {
        k: _ToRight(factor, (grams[k].diagonal() == 0).float())
        for k, factor in zip(held, factors, strict=True)
    }


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
    _copy([block.momentum for block in rounded], [block.total for block in rounded])
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


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
