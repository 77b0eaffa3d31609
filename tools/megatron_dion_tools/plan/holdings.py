"""How much of every matrix each rank of a grid holds, for all ranks at once.

Arrays are indexed by [data-parallel rank, tensor-parallel rank], (D, T) below.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dion.sharding import Layout, Rank
from megatron_dion.sharding.matrices import Segment

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Holding:
    """What the ranks hold of one matrix.

    Attributes:
        matrix: its index.
        rows: (D, T), rows of which a rank has any columns.
        elements: (D, T).
        kept: (T,), columns of Q that a rank keeps of its rows.
        multiplied: (D, T), elements that a rank multiplies: of copies only a share.
        is_partial: whether R of its rows is a sum over tensor-parallel ranks.
    """

    matrix: int
    rows: Counts
    elements: Counts
    kept: Counts
    multiplied: Counts
    is_partial: bool


def pieces(start: int, numel: int, bucket_numel: int, ranks: int) -> tuple[Counts, Counts]:
    """First and one past last element that each data-parallel rank holds of a parameter.

    Args:
        start: of the parameter in its bucket.
        numel: of the parameter.
        bucket_numel: of the bucket, which is cut evenly.
        ranks: number of data-parallel ranks.
    """
    shard = bucket_numel // ranks
    first = np.arange(ranks, dtype=np.int64) * shard - start
    return np.clip(first, 0, numel), np.clip(first + shard, 0, numel)


def holdings(layout: Layout, placements: Iterable[int] | None = None) -> Iterator[Holding]:
    """What all ranks hold of each matrix of some weights, by default of all."""
    size = layout.grid.tensor_parallel_size
    for index in range(len(layout.placements)) if placements is None else placements:
        weight = layout.placements[index].weight
        first, last = _pieces_of(layout, index)
        touched = -(-last // weight.columns) * (first < last), first // weight.columns
        segments = [list(weight.segments(t)) for t in range(size)]
        count = len(weight.shapes())
        for part in range(count):
            matrix = layout.first_matrix[index] + part
            rows, elements = [], []
            for mine in segments:
                bounds = _bounds(mine, part)
                held = _inside(bounds, touched[0]) - _inside(bounds, touched[1])
                rows.append(np.where(first < last, held, 0))
                bounds = bounds * weight.columns
                elements.append(_inside(bounds, last) - _inside(bounds, first))
            by_rank = np.stack(elements, axis=1)
            yield Holding(
                matrix,
                np.stack(rows, axis=1),
                by_rank,
                np.array([_kept(layout, index, matrix, t) for t in range(size)]),
                _multiplied(layout, index, matrix) if layout.is_duplicated(index) else by_rank,
                layout.shares_rows(index),
            )


def shared_row_numbers(layout: Layout, placement: int) -> Counts:
    """Numbers of R that ranks send for rows that are cut between data-parallel ranks (D, T)."""
    where = layout.placements[placement]
    weight, size = where.weight, layout.grid.data_parallel_size
    shard = where.bucket_numel // size
    first, last = _pieces_of(layout, placement)
    held = first < last
    begins = held & (first % weight.columns > 0)
    ends = held & (last % weight.columns > 0)
    ends &= ~(begins & (last // weight.columns == first // weight.columns))
    numbers = np.zeros((size, layout.grid.tensor_parallel_size), np.int64)
    for t in range(layout.grid.tensor_parallel_size):
        for cut, row in ((begins, first // weight.columns), (ends, last // weight.columns)):
            row = row[cut]
            start = where.start + row * weight.columns
            peers = (start + weight.columns - 1) // shard - start // shard
            numbers[cut, t] += peers * _widths_of_rows(layout, placement, t, row)
    return numbers


def _widths_of_rows(layout: Layout, placement: int, tensor_rank: int, rows: Counts) -> Counts:
    """The ranks r of the matrices to which rows of a rank's parameter belong."""
    segments = list(layout.placements[placement].weight.segments(tensor_rank))
    first = layout.first_matrix[placement]
    starts = np.array([segment.local_row for segment in segments])
    widths = np.array([layout.matrices[first + segment.part].rank for segment in segments])
    return widths[np.searchsorted(starts, rows, side="right") - 1]


def _pieces_of(layout: Layout, placement: int) -> tuple[Counts, Counts]:
    where = layout.placements[placement]
    numel = where.weight.rows * where.weight.columns
    return pieces(where.start, numel, where.bucket_numel, layout.grid.data_parallel_size)


def _bounds(segments: list[Segment], part: int) -> Counts:
    """First and one past last local row of a part's segments (segments, 2)."""
    found = [(s.local_row, s.local_row + s.rows) for s in segments if s.part == part]
    return np.array(found, np.int64).reshape(-1, 2)


def _inside(bounds: Counts, upto: Counts) -> Counts:
    """How much of some intervals lies before each of some positions."""
    total = np.zeros_like(upto)
    for start, stop in bounds:
        total += np.clip(upto - start, 0, stop - start)
    return total


def _kept(layout: Layout, placement: int, matrix: int, tensor_rank: int) -> int:
    columns = layout.share(placement, layout.matrices[matrix].rank, Rank(tensor_rank, 0))
    return columns.stop - columns.start


def _multiplied(layout: Layout, placement: int, matrix: int) -> Counts:
    """Of copies on tensor-parallel ranks: each block is shared out by itself."""
    grid = layout.grid
    found = np.zeros((grid.data_parallel_size, grid.tensor_parallel_size), np.int64)
    for rank in grid.ranks():
        for held in layout.held(placement, rank):
            if held.matrix == matrix:
                rows = held.multiplied.stop - held.multiplied.start
                found[rank.data_parallel, rank.tensor_parallel] += rows * held.rectangle.columns
    return found
