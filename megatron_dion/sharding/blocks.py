"""The rectangles of logical matrices that lie in a contiguous piece of a flattened parameter.

Megatron's distributed optimizer cuts a flat buffer at arbitrary elements, so a rank's piece of a
parameter is the rest of a row, whole rows, and the start of a row; each is a rectangle, and so is
its part of each logical matrix.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from megatron_dion.sharding.matrices import Weight


class Rectangle(NamedTuple):
    """Rows row_start:row_stop, columns column_start:column_stop of one logical matrix."""

    matrix: int  # index of the logical matrix
    row_start: int
    row_stop: int
    column_start: int
    column_stop: int
    offset: int  # of its first element in the rank's piece, where it is contiguous
    cut: bool  # whether other pieces of the same parameter hold more columns of its row

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def column_range(self) -> tuple[int, int]:
        return self.column_start, self.column_stop

    @property
    def columns(self) -> int:
        return self.column_stop - self.column_start

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def rectangles(
    weight: Weight, tensor_parallel_rank: int, start: int, stop: int, first_matrix: int = 0
) -> tuple[Rectangle, ...]:
    """Tiles elements start:stop of a rank's flattened parameter, matrix by matrix.

    The index of the weight's first logical matrix is `first_matrix`.
    """
    first_column = weight.first_column(tensor_parallel_rank)
    segments = list(weight.segments(tensor_parallel_rank))
    tiles = []
    for _, (rows, columns), (row, column) in boxes((weight.rows, weight.columns), start, stop):
        for segment in segments:
            low = max(row, segment.local_row)
            high = min(row + rows, segment.local_row + segment.rows)
            if low < high:
                shift = segment.matrix_row - segment.local_row
                tiles.append(
                    Rectangle(
                        matrix=first_matrix + segment.part,
                        row_start=low + shift,
                        row_stop=high + shift,
                        column_start=first_column + column,
                        column_stop=first_column + column + columns,
                        offset=low * weight.columns + column - start,
                        cut=columns < weight.columns,
                    )
                )
    return tuple(sorted(tiles, key=lambda tile: tile.matrix))  # in the order of memory in each


def boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Tiles elements start:stop of a row-major tensor.

    Yields:
        For each box the offset of its first element in the flattened tensor, its shape and its
        corner; the box is contiguous.
    """
    if start >= stop:
        return
    inner = prod(shape[1:])
    while start < stop:
        row, rest = divmod(start, inner)
        if len(shape) == 1:
            yield start, (stop - start,), (start,)
            return
        if rest == 0 and stop - start >= inner:
            rows = (stop - start) // inner
            yield start, (rows, *shape[1:]), (row, *(0 for _ in shape[1:]))
            start += rows * inner
        else:
            end = min(inner, rest + stop - start)
            for offset, inner_shape, corner in boxes(shape[1:], rest, end):
                yield row * inner + offset, (1, *inner_shape), (row, *corner)
            start += end - rest
