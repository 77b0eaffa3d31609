"""Carries out a plan with torch.distributed: the collectives of a step and their buffers.

docs/design.md lists the collectives of a step; only sums of Gram matrices, of which 64 MiB are
there at a time, grow in number with the matrices. Each is started, then the step yields, then it
waits. Only the orthonormalization does not yield: all ranks must yield equally often, and a rank
that owns no P waits for nothing there.
"""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dion.algorithm.exchange import Steps
from megatron_dion.algorithm.orthonormalize import orthonormalize_bytes
from megatron_dion.algorithm.step import step_bytes
from megatron_dion.sharding.buffers import Buffers
from megatron_dion.sharding.collectives import TORCH_DTYPES, Groups, Setup, size_of
from megatron_dion.sharding.left_factor import LeftFactorExchange
from megatron_dion.sharding.norms import NormExchange
from megatron_dion.sharding.plan import Plan
from megatron_dion.sharding.right_factor import RightFactorExchange


class ShardedExchange:
    """The exchange of one rank of a grid (`Exchange` of `algorithm/exchange.py`).

    Its buffers have memory within `allocated` only.

    Args:
        plan: of this rank.
        groups: the processes; P and R are averaged over replicas.
        device: where the matrices are. On the `meta` device buffers are counted, not made.
        replicas: number of replicas; by default the size of `groups.replicas`.

    Attributes:
        nbytes: the most bytes that buffers take at a time.
        temporary_bytes: the most that the computations of a step take besides.
        of_rectangles: for each rectangle of the plan the rows of P of its columns, (columns, r),
            its rows of R, (rows, r), and the squared norms of its rows of B, (rows,).
    """

    def __init__(
        self, plan: Plan, groups: Groups, device: torch.device, replicas: int | None = None
    ) -> None:
        self.device = device
        self._tensor_group = groups.tensor
        self._memory, self._left_transit, right_transit = (Buffers(device) for _ in range(3))
        count = size_of(groups.replicas) if replicas is None else replicas
        config = plan.layout.config
        self.has_residual = config.residual == "rows" and count == 1
        setup = Setup(plan, groups, count, TORCH_DTYPES[config.comm_dtype], self.has_residual)
        self._left = LeftFactorExchange(setup, self._memory, self._left_transit)
        self._right = RightFactorExchange(setup, self._memory, right_transit)
        self._norms = NormExchange(setup, self._memory)
        self.column_squares, self.totals = self._norms.columns, self._norms.totals
        self.clear_left, self.clear_norms = self._left.clear, self._norms.clear
        self.gather_right, self.sum_right = self._right.gather, self._right.sum
        self.sum_norms = self._norms.sum
        parts = (self._left, self._right, self._norms)
        self.of_rectangles = list(zip(*(part.of_rectangles for part in parts), strict=True))
        self.nbytes = self._memory.nbytes + max(self._left_transit.nbytes, right_transit.nbytes)
        right, matrices, pieces = (Counter[Any]() for _ in range(3))
        for (placement, rectangle), rows in zip(
            plan.rectangles, self._right.of_rectangles, strict=True
        ):
            right[placement, rows.shape] += rows.numel()
            matrices[placement, rectangle.matrix] += rectangle.numel
            pieces[placement, rectangle.matrix] += 1
        fused = [numbers for key, numbers in matrices.items() if pieces[key] > 1]
        dividing = orthonormalize_bytes(self._left.batches)
        self.temporary_bytes = max(dividing, step_bytes(right, fused))
        for buffers in (self._memory, self._left_transit, right_transit):
            buffers.free()

    def bytes_sent(self) -> dict[str, int]:
        """By group, the bytes that this rank sends to others in a step, as rings send them."""
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

    def sum_left(self) -> Generator[None, None, Sequence[Tensor]]:
        self._left_transit.allocate()
        yield from self._left.sum()
        return self._left.batches

    def reduce_rows(self, tensor: Tensor, operation: Any) -> None:
        if size_of(self._tensor_group) > 1:
            dist.all_reduce(tensor, operation, group=self._tensor_group)

    def spread_left(self) -> Steps:
        yield from self._left.spread()
        self._left_transit.free()
