"""The rectangles of logical matrices that lie in a contiguous piece of a flattened parameter.

Megatron's distributed optimizer cuts a flat buffer at arbitrary elements, so a rank's piece of a
parameter is the rest of a row, whole rows, and the start of a row; each is a rectangle, and so is
its part of each logical matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dion.sharding.matrices import Weight


@dataclass(frozen=True)
class Rectangle:
    """Rows row_start:row_stop, columns column_start:column_stop of one logical matrix.

    Attributes:
        part: index of the logical matrix in `Weight.matrices`.
        offset: of the rectangle's first element in the rank's piece, where it is contiguous.
        cut: whether other pieces of the same parameter hold more columns of its row.
    """

    part: int
    row_start: int
    row_stop: int
    column_start: int
    column_stop: int
    offset: int
    cut: bool

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def columns(self) -> int:
        return self.column_stop - self.column_start

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def rectangles(
    weight: Weight, tensor_parallel_rank: int, start: int, stop: int
) -> tuple[Rectangle, ...]:
    """Tiles elements start:stop of a rank's flattened parameter, in their order in memory."""
    first_column = weight.first_column(tensor_parallel_rank)
    segments = list(weight.segments(tensor_parallel_rank))
    found = []
    for row_start, row_stop, column_start, column_stop in _row_runs(start, stop, weight.columns):
        for segment in segments:
            low = max(row_start, segment.local_row)
            high = min(row_stop, segment.local_row + segment.rows)
            if low < high:
                shift = segment.matrix_row - segment.local_row
                found.append(
                    Rectangle(
                        part=segment.part,
                        row_start=low + shift,
                        row_stop=high + shift,
                        column_start=first_column + column_start,
                        column_stop=first_column + column_stop,
                        offset=low * weight.columns + column_start - start,
                        cut=column_stop - column_start < weight.columns,
                    )
                )
    return tuple(found)


def _row_runs(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Splits elements start:stop of a row-major matrix into a cut row, whole rows, a cut row."""
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            rows = (stop - start) // columns
            yield row, row + rows, 0, columns
            start += rows * columns
        else:
            end = min(columns, column + stop - start)
            yield row, row + 1, column, end
            start += end - column
