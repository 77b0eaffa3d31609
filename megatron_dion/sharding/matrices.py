"""Which logical matrices a parameter holds, and which of their rows and columns a rank has.

A fused weight interleaves the rows of several matrices in a repeating pattern: a query group's
queries, then its key, then its value; a tensor-parallel rank's gate, then its up projection. One
description serves them all: the rows of one period, by part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.exchange import Matrix


class Part(NamedTuple):
    """Consecutive rows of one logical matrix within one period of a fused weight."""

    name: str
    rows: int


class Segment(NamedTuple):
    """Rows of a rank's parameter that are consecutive rows of one logical matrix."""

    part: int  # index of the logical matrix in `Weight.matrices`
    local_row: int  # first row in the rank's parameter
    matrix_row: int  # first row in the logical matrix
    rows: int


@dataclass(frozen=True)
class Weight:
    """A 2-D parameter as tensor parallelism shards it.

    Raises:
        ValueError: the periods do not fill the rows.
    """

    name: str  # global, the same in every topology
    rows: int  # of a rank's parameter
    columns: int  # of a rank's parameter
    # 0 if the ranks hold different rows (column-parallel linear layer), 1 if they hold different
    # columns (row-parallel), None if all hold the same.
    partition_dim: int | None = None
    tensor_parallel_size: int = 1
    # One period of the rows of all ranks' parameters, put one below the other; empty for a weight
    # that is one matrix.
    parts: tuple[Part, ...] = ()
    # Whether a part is another matrix in each period (one attention head), or its rows in all
    # periods are one matrix (all queries).
    separate_periods: bool = False
    # Whether all parts are one matrix after all, in which the first part's rows of all periods come
    # first, then the second's: the order that no topology changes.
    joined: bool = False

    def __post_init__(self) -> None:
        if self.global_rows % self._period:
            raise ValueError(
                f"{self.name}: {self.global_rows} rows are no multiple of the"
                f" {self._period} rows of {[part.name for part in self.parts]}"
            )

    @property
    def global_rows(self) -> int:
        return self.rows * (self.tensor_parallel_size if self.partition_dim == 0 else 1)

    @property
    def global_columns(self) -> int:
        return self.columns * (self.tensor_parallel_size if self.partition_dim == 1 else 1)

    @property
    def _period(self) -> int:
        return sum(part.rows for part in self.parts) or self.global_rows

    @cached_property
    def _period_parts(self) -> tuple[Part, ...]:
        return self.parts or (Part("", self.global_rows),)

    def shapes(self) -> list[tuple[str, int, int]]:
        """Name, rows and columns of each logical matrix: one for each part, or of each period."""
        columns = self.global_columns
        if self.joined:
            return [(self.name, self.global_rows, columns)]
        periods, parts = self.global_rows // self._period, self._period_parts
        if self.separate_periods:
            return [
                (f"{self.name}[{part.name}.{period}]", part.rows, columns)
                for period in range(periods)
                for part in parts
            ]
        names = [f"{self.name}[{part.name}]" if part.name else self.name for part in parts]
        rows = [part.rows * periods for part in parts]
        return [(name, m, columns) for name, m in zip(names, rows, strict=True)]

    def matrices(self, config: DionConfig) -> list[Matrix]:
        """The logical matrices, with the ranks of their updates."""
        return [
            Matrix(name, rows, columns, config.rank(rows, columns))
            for name, rows, columns in self.shapes()
        ]

    def first_column(self, tensor_parallel_rank: int) -> int:
        """The column of the logical matrices that is column 0 of a rank's parameter."""
        return tensor_parallel_rank * self.columns if self.partition_dim == 1 else 0

    def segments(self, tensor_parallel_rank: int) -> Iterator[Segment]:
        """All rows of a rank's parameter, from its first to its last."""
        first = tensor_parallel_rank * self.rows if self.partition_dim == 0 else 0
        last = first + self.rows
        row = first
        while row < last:
            period, within = divmod(row, self._period)
            part, offset = self._part_at(within)
            length = self._period_parts[part].rows
            rows = min(length - offset, last - row)
            in_part = period * length + offset
            if self.separate_periods:
                yield Segment(period * len(self.parts) + part, row - first, offset, rows)
            elif self.joined:
                yield Segment(0, row - first, self._rows_before(part) + in_part, rows)
            else:
                yield Segment(part, row - first, in_part, rows)
            row += rows

    def _rows_before(self, part: int) -> int:
        """Rows of the parts before one, in all periods."""
        periods = self.global_rows // self._period
        return periods * sum(before.rows for before in self._period_parts[:part])

    def _part_at(self, row: int) -> tuple[int, int]:
        """The part at a row of the period, and the row within that part."""
        for index, part in enumerate(self._period_parts):
            if row < part.rows:
                return index, row
            row -= part.rows
        raise AssertionError("the row lies outside of the period")


def compression_pays(matrices: Sequence[Matrix]) -> bool:
    """Whether P and R of all matrices of a weight are smaller than its gradient."""
    compressed = sum((m.rows + m.columns) * m.rank for m in matrices)
    return compressed < sum(m.rows * m.columns for m in matrices)
