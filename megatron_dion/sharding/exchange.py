"""Carries out a plan with torch.distributed: the collectives of a step and their buffers.

The number of collectives of a step does not depend on the number of matrices; docs/design.md lists
them. Each is started, then the step yields, then it waits. The orthonormalization alone does not
yield: how often it would have to differs between ranks.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_dion.algorithm.exchange import Steps
from megatron_dion.algorithm.orthonormalize import RowSums
from megatron_dion.sharding.buffers import Buffers
from megatron_dion.sharding.collectives import (
    TORCH_DTYPES,
    Groups,
    GroupSums,
    Setup,
    size_of,
)
from megatron_dion.sharding.left_factor import LeftFactorExchange
from megatron_dion.sharding.norms import NormExchange
from megatron_dion.sharding.plan import Plan
from megatron_dion.sharding.right_factor import RightFactorExchange


class ShardedExchange:
    """The exchange of one rank of a grid (`megatron_dion.algorithm.Exchange`).

    Its buffers have memory within `allocated` only.

    Args:
        plan: of this rank.
        groups: the processes; P and R are averaged over replicas.
        device: where the matrices are. On the `meta` device buffers are counted, not made.
        replicas: number of replicas; by default the size of `groups.replicas`.

    Attributes:
        nbytes: the most bytes that buffers and Gram matrices take at a time.
        of_rectangles: for each rectangle of the plan the rows of P of its columns, (columns, r),
            its rows of R, (rows, r), and the squared norms of its rows of B, (rows,).
    """

    def __init__(
        self, plan: Plan, groups: Groups, device: torch.device, replicas: int | None = None
    ) -> None:
        self.device = device
        self.row_sums: RowSums = GroupSums(groups.tensor)
        self._memory, self._left_transit, right_transit = (Buffers(device) for _ in range(3))
        count = size_of(groups.replicas) if replicas is None else replicas
        config = plan.layout.config
        self.has_residual = config.residual == "rows" and count == 1
        setup = Setup(plan, groups, count, TORCH_DTYPES[config.comm_dtype], self.has_residual)
        self._left = LeftFactorExchange(setup, self._memory, self._left_transit)
        self._right = RightFactorExchange(setup, self._memory, right_transit)
        self._norms = NormExchange(setup, self._memory)
        self.column_squares, self.totals = self._norms.columns, self._norms.totals
        parts = (self._left, self._right, self._norms)
        self.of_rectangles = list(zip(*(part.of_rectangles for part in parts), strict=True))
        transit = self._left_transit.nbytes + self._left.gram_bytes, right_transit.nbytes
        self.nbytes = self._memory.nbytes + max(transit)
        for buffers in (self._memory, self._left_transit, right_transit):
            buffers.free()

    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank hands to collectives for other ranks in a step, as rings send them.

        Returns:
            Bytes by group: `tensor`, `data` and `replicas`.
        """
        sent = self._left.bytes_sent() + self._right.bytes_sent() + self._norms.bytes_sent()
        return {name: sent[name] for name in ("tensor", "data", "replicas")}

    @contextmanager
    def allocated(self) -> Iterator[None]:
        """Memory for the time of a step."""
        with self._memory.allocated():
            try:
                yield
            finally:
                self._left_transit.free()

    def gather_right(self) -> Steps:
        yield from self._right.gather()

    def clear_left(self) -> None:
        self._left.clear()

    def sum_left(self) -> Generator[None, None, Sequence[Tensor]]:
        self._left_transit.allocate()
        yield from self._left.sum()
        return self._left.owned()

    def spread_left(self) -> Steps:
        yield from self._left.spread()
        self._left_transit.free()

    def sum_right(self) -> Steps:
        yield from self._right.sum()

    def clear_numbers(self) -> None:
        self._norms.clear()

    def sum_numbers(self) -> Steps:
        yield from self._norms.sum()


def bytes_sent(plan: Plan, replicas: int = 1) -> dict[str, int]:
    """`ShardedExchange.bytes_sent` of a rank that need not exist."""
    return ShardedExchange(plan, Groups(), torch.device("meta"), replicas).bytes_sent()
