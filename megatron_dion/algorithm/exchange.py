"""What a step says to other processes: the matrices, what is summed of them, and by whom."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Steps = Generator[None, None, None]
"""Yields while a collective is under way."""


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
    divided: Mapping[int, str]
    """Matrices whose P is orthonormalized by sums over several processes, the same on all, and the
    method."""
    merged: frozenset[int]
    """Matrices whose P is orthonormalized by triangles of its sections, on several processes."""

    def clear_left(self) -> None:
        """Sets all `left_factor`s of this process to zero."""

    def gather_right(self) -> Steps:
        """Completes the `right_factor`s, of which processes keep different columns."""

    def sum_left(self) -> Generator[None, None, list[Section]]:
        """Sums P over the processes; returns the sections of which this one is in charge."""

    def sum_parts(self, method: str, phase: int, parts: Sequence[tuple[int, Tensor]]) -> Steps:
        """Sums (matrix, (k, r)) over the processes in charge of its sections, in place.

        They are those of this method; the phase is the index of k in its `summed_rows`.
        """

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

    def sum_right(self, sums: Sequence[tuple[int, Tensor]]) -> Steps:
        """Sums (matrix, (k, r)) over the processes that hold blocks of the matrix, in place.

        They are float64: squared norms of R's columns, k = 1, or its Gram matrix, k = r.
        """
