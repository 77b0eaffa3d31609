"""Rows that several ranks hold: their columns of Q, and their sums of R."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm import Steps, copy_all
from megatron_dion.sharding.buffers import Buffers
from megatron_dion.sharding.collectives import (
    TORCH_DTYPES,
    Groups,
    all_to_all,
    give_way,
    like_views,
    wait_for,
)
from megatron_dion.sharding.plan import Plan, SharedRow


class GatheredColumns:
    """Brings together the columns of Q that tensor-parallel ranks keep of the rows they share."""

    def __init__(
        self,
        plan: Plan,
        projections: Sequence[Tensor],
        groups: Groups,
        device: torch.device,
    ) -> None:
        self._group = groups.tensor
        self.memory = Buffers(device)
        self._is_silent = not plan.has_partial_rows
        if self._is_silent:
            return
        size = plan.layout.grid.tensor_parallel_size
        self._theirs: list[list[Tensor]] = [[] for _ in range(size)]
        for held, view in zip(plan.held, projections, strict=True):
            if plan.is_partial(held):
                for peer in plan.layout.grid.tensor_group(plan.rank):
                    columns = plan.layout.share(held.placement, view.shape[1], peer)
                    self._theirs[peer.tensor_parallel].append(view[:, columns])
        # Shares differ by a column at most; each rank's place is as large as the largest.
        numel = max(sum(view.numel() for view in views) for views in self._theirs)
        dtype = TORCH_DTYPES[plan.layout.config.factor_dtype]
        self._sent = self.memory.empty(numel, dtype)
        self._received = self.memory.empty(size * numel, dtype)
        self._mine = self._theirs[plan.rank.tensor_parallel]
        self._places = [
            like_views(buffer, views)
            for buffer, views in zip(self._received.view(size, numel), self._theirs, strict=True)
        ]
        self._place = like_views(self._sent, self._mine)
        self.memory.free()

    def gather(self) -> Steps:
        if self._is_silent:
            yield from give_way(self._group)
            return
        with self.memory.allocated():
            copy_all(self._place, self._mine)
            yield from wait_for(
                dist.all_gather_into_tensor(
                    self._received, self._sent, group=self._group, async_op=True
                )
            )
            for views, places in zip(self._theirs, self._places, strict=True):
                copy_all(views, places)


class SharedRows:
    """Sums of the rows of R that data-parallel ranks share; every holder adds up all parts.

    All add in the order of the ranks, so their copies of a row are equal to the last bit.
    """

    def __init__(
        self,
        plan: Plan,
        projections: Sequence[Tensor],
        group: ProcessGroup | None,
        device: torch.device,
        wire: torch.dtype,
    ) -> None:
        self._group = group
        self.memory = Buffers(device)
        self._is_silent = not plan.has_shared_rows
        if self._is_silent:
            return
        starts = {
            (held.matrix, held.rectangle.row_start): view
            for held, view in zip(plan.held, projections, strict=True)
        }

        def row_views(rows: Iterable[SharedRow]) -> list[Tensor]:
            return [starts[shared.matrix, shared.row][0] for shared in rows]  # each (r,)

        mine = sorted({(row.matrix, row.row) for peer in plan.shared_rows for row in peer})
        self._mine = row_views(SharedRow(*key) for key in mine)
        self._parts = [row_views(rows) for rows in plan.shared_rows]
        self._outgoing = [view for views in self._parts for view in views]
        self._sizes = [sum(view.numel() for view in views) for views in self._parts]
        self._sent = self.memory.empty(sum(self._sizes), wire)
        self._received = self.memory.empty(sum(self._sizes), wire)
        self._sent_views = like_views(self._sent, self._outgoing)
        self._received_views = [
            like_views(buffer, views)
            for buffer, views in zip(self._received.split(self._sizes), self._parts, strict=True)
        ]
        # Every row of this rank's is sent to somebody.
        sent = [(row.matrix, row.row) for rows in plan.shared_rows for row in rows]
        copies = dict(zip(sent, self._sent_views, strict=True))
        self._mine_as_sent = [copies[key] for key in mine]
        self.memory.free()

    def sum(self) -> Steps:
        if self._is_silent:
            yield from give_way(self._group)
            return
        with self.memory.allocated():
            if self._sent.dtype != torch.float32:
                copy_all(self._mine, [view.to(self._sent.dtype) for view in self._mine])
            copy_all(self._sent_views, self._outgoing)
            yield from all_to_all(self._received, self._sent, self._sizes, self._sizes, self._group)
            self._add_up()

    def _add_up(self) -> None:
        if not self._mine:
            return
        torch._foreach_zero_(self._mine)
        for peer, (views, received) in enumerate(
            zip(self._parts, self._received_views, strict=True)
        ):
            if peer == dist.get_rank(self._group):
                torch._foreach_add_(self._mine, self._mine_as_sent)
            elif views:
                torch._foreach_add_(views, received)
