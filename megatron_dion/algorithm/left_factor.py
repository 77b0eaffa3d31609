"""Orthonormalizes P in place: whole, in sections by sums over processes, or by triangles."""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.counter_random import signs
from megatron_dion.algorithm.exchange import Exchange, Matrix, Section, Stack
from megatron_dion.algorithm.foreach import copy_all
from megatron_dion.algorithm.orthonormalize import (
    ONCE,
    PartialSums,
    factor,
    orthonormalize,
    orthonormalize_part,
    pack,
    summed_rows,
    unpack,
)

_CACHE_BYTES = 1 << 20
"""Of the sections of P that a CPU orthonormalizes together: they stay in a core's cache."""

_Done = tuple[list[Section], Tensor]
"""A batch of sections, and what they become (batch, rows, r)."""


def orthonormalize_left(
    matrices: Sequence[Matrix],
    sections: Sequence[Section],
    exchange: Exchange,
    config: DionConfig,
    step: int,
) -> Generator[None, None, int]:
    """Orthonormalizes sections of P in place, in batches of equal shape.

    Args:
        matrices: all matrices.
        sections: of P, summed; those of equal `(merged, columns, shape)` side by side.
        exchange: connects the processes.
        config: hyperparameters.
        step: number of this step, for the random numbers.

    Returns:
        How often this process fell back to Householder QR.
    """
    fallbacks = 0
    merged: list[list[Section]] = []
    divided: list[list[Section]] = []
    for batch in _batches(matrices, sections, exchange):
        if batch[0].matrix in exchange.merged:
            merged.append(batch)
            continue
        if batch[0].matrix in exchange.divided:
            divided.append(batch)
            continue
        stacked, sketch = _stacked(batch, config, step)
        result, failures = orthonormalize(
            stacked, config.orthonormalizer, sketch, config.oversample
        )
        fallbacks += failures
        _store(batch, result)
    if exchange.divided:
        fallbacks += yield from _orthonormalize_parts(divided, exchange, config, step)
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
        stacked, sketch = _stacked(batch, config, step)
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
            copy_all(each, pack(part).unbind())
    return fallbacks


def _orthonormalize_parts(
    batches: Sequence[list[Section]], exchange: Exchange, config: DionConfig, step: int
) -> Generator[None, None, int]:
    """By sums, all in step with each other and with all processes, also those without sections.

    What that fails to do is done by triangles.

    Args:
        batches: sections of this process, those of a batch alike.
        exchange: connects the processes.
        config: hyperparameters.
        step: number of this step.

    Returns:
        How often this process fell back to Householder QR.
    """
    method_of = exchange.divided
    done: list[_Done] = []
    failed: list[int] = []
    for method in sorted(set(method_of.values())):
        here = [batch for batch in batches if method_of[batch[0].matrix] == method]
        results, those = yield from _by_sums(method, here, exchange, config, step)
        done += results
        failed += those
    # Rounding may let processes come to other verdicts of the same sums: nothing is stored before
    # all have agreed.
    agreed = yield from exchange.agree(failed)
    broken = _store_all_but(agreed, done)
    if not agreed:
        return 0
    sure = config if config.orthonormalizer == "auto" else replace(config, orthonormalizer="qr")
    fallbacks = yield from _merge(agreed, broken, exchange, sure, step)
    return fallbacks + sum(method_of[s.matrix] != ONCE for batch in broken for s in batch)


def _store_all_but(matrices: Collection[int], done: Sequence[_Done]) -> list[list[Section]]:
    """Stores what sections became; returns those of some matrices, as they were."""
    others: list[list[Section]] = []
    for batch, result in done:
        kept = [i for i, section in enumerate(batch) if section.matrix not in matrices]
        if kept:
            _store([batch[i] for i in kept], result[kept])
        if left := [section for section in batch if section.matrix in matrices]:
            others.append(left)
    return others


@dataclass
class _Part:
    sections: list[Section]
    sums: PartialSums


def _by_sums(
    method: str,
    batches: Sequence[list[Section]],
    exchange: Exchange,
    config: DionConfig,
    step: int,
) -> Generator[None, None, tuple[list[_Done], list[int]]]:
    """Returns what sections become, batch by batch, and the matrices for which that is no use."""
    parts = [
        _Part(batch, orthonormalize_part(stacked, method, sketch, config.oversample))
        for batch in batches
        for stacked, sketch in [_stacked(batch, config, step)]
    ]
    partial = [next(part.sums) for part in parts]
    last = len(summed_rows(method, 1, config.oversample)) - 1
    for phase in range(last + 1):
        here = [
            (section.matrix, values)
            for part, batch in zip(parts, partial, strict=True)
            for section, values in zip(part.sections, batch, strict=True)
        ]
        yield from exchange.sum_parts(method, phase, here)
        if phase < last:
            partial = [part.sums.send(sums) for part, sums in zip(parts, partial, strict=True)]
    done: list[_Done] = []
    failed: list[int] = []
    for part, sums in zip(parts, partial, strict=True):
        result, has_failed = _result(part.sums, sums)
        done.append((part.sections, result))
        pairs = zip(part.sections, has_failed.tolist(), strict=True)
        failed += [section.matrix for section, broken in pairs if broken]
    return done, failed


def _result(sums: PartialSums, last: Tensor) -> tuple[Tensor, Tensor]:
    try:
        sums.send(last)
    except StopIteration as end:
        return end.value
    raise AssertionError("a part asks for more sums than it has phases")


def _likeness(
    matrices: Sequence[Matrix], section: Section, exchange: Exchange
) -> tuple[bool, int, torch.Size]:
    """Sections with the same one are done together; such stand side by side in the list."""
    columns = matrices[section.matrix].columns
    return section.matrix in exchange.merged, columns, section.values.shape


def _stacked(
    batch: Sequence[Section], config: DionConfig, step: int
) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Sections of equal shape (batch, rows, r), and their sketch."""
    stacked = torch.stack([section.values for section in batch])
    return stacked, _sketch_of([section.start for section in batch], stacked, config, step)


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
    copy_all([section.values for section in sections], results.unbind())
