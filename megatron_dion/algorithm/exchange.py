"""What a step asks of other processes: sums of P, R and column norms, and rows of Q."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dion.algorithm.orthonormalize import RowSums

Steps = Generator[None, None, None]
"""Yields while a collective is under way."""


@dataclass(frozen=True)
class Matrix:
    """A logical matrix: what Dion updates as one, however it is stored."""

    name: str  # unique in the whole model and the same in every topology
    rows: int  # m, global
    columns: int  # n, global
    rank: int  # r


class Exchange(Protocol):
    """The communication of a step. All buffers belong to it and keep their place.

    Every process calls the same methods in the same order.
    """

    device: torch.device
    """Where the matrices are."""
    row_sums: RowSums
    """Combines processes that hold other rows of the same orthonormalized P."""
    column_squares: dict[int, Tensor]
    """By index of the matrix, for the squared norms of the columns of R: (r,) float64."""
    totals: dict[int, Tensor]
    """By index of the matrix, for ||B||_F^2: (1,) float64."""
    has_residual: bool
    """Whether weights move along the residual, too. Where gradients differ between replicas, they
    do not: the residuals differ as well."""

    def gather_right(self) -> Steps:
        """Completes the `right_factor`s of rows of which processes store different columns."""

    def clear_left(self) -> None:
        """Sets every `left_factor` of this process to zero."""

    def sum_left(self) -> Generator[None, None, Sequence[Tensor]]:
        """Sums P over the processes.

        Returns:
            The rows of P that this process orthonormalizes, each (batch, rows, r).
        """

    def spread_left(self) -> Steps:
        """Brings the orthonormalized P into the `left_factor`s of all processes."""

    def sum_right(self) -> Steps:
        """Sums the `projection`s of rows whose columns lie on several processes."""

    def clear_numbers(self) -> None:
        """Sets `column_squares`, `totals` and the `row_squares` of blocks to zero."""

    def sum_numbers(self) -> Steps:
        """Sums `column_squares` and `totals` over all processes, `row_squares` over its holders."""
