"""What a step asks of other processes: sums of P, R and column norms, and rows of Q."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

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
    """The communication of a step, which owns the buffers of P, R and their norms.

    Every process calls the same methods in the same order.
    """

    device: torch.device
    """Where the matrices are."""
    column_squares: dict[int, Tensor]
    """For the squared norms of the columns of R, (r,) float64, by index of the matrix."""
    totals: dict[int, Tensor]
    """For ||B||_F^2, (1,) float64, by index of the matrix."""
    has_residual: bool
    """Whether weights move along the residual, too. They do not where replicas have gradients of
    their own, because the replicas' residuals then differ."""

    def gather_right(self) -> Steps:
        """Completes `right_factor` in the rows of which each process stores some columns."""

    def clear_left(self) -> None:
        """Sets every `left_factor` of this process to zero."""

    def sum_left(self) -> Generator[None, None, Sequence[Tensor]]:
        """Sums P over the processes.

        Returns:
            The rows of P that this process orthonormalizes, each (batch, rows, r).
        """

    def reduce_rows(self, tensor: Tensor, operation: Any) -> None:
        """Combines a tensor, in place, over the processes that orthonormalize a P together."""

    def spread_left(self) -> Steps:
        """Copies the orthonormalized P into the `left_factor`s of all processes."""

    def sum_right(self) -> Steps:
        """Sums the `projection`s of rows whose columns lie on several processes."""

    def clear_norms(self) -> None:
        """Sets `column_squares`, `totals` and the `row_squares` of blocks to zero."""

    def sum_norms(self) -> Steps:
        """Sums `column_squares`, `totals` and `row_squares` over the processes that have parts."""
