"""Carries out a plan with torch.distributed: the buffers, and the collectives between them.

The number of collectives of a step does not depend on the number of matrices; docs/design.md lists
them. Each is started, then the step yields, then it waits.
"""

from collections.abc import Callable, Generator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm import Section, Steps
from megatron_dion.sharding.collectives import (
    TORCH_DTYPES,
    Groups,
    copy_all,
    larger_than_one,
    like_views,
    size_of,
    wait_for,
)
from megatron_dion.sharding.plan import Plan
from megatron_dion.sharding.reducer import Reducer
from megatron_dion.sharding.reduction import Reduction, Tile
from megatron_dion.sharding.shared_rows import GatheredColumns, SharedRows


class ShardedExchange:
    """The exchange of one rank of a grid (`megatron_dion.algorithm.Exchange`).

    Args:
        plan: of this rank.
        groups: the processes; P and R are averaged over replicas.
        device: where the matrices are.

    Attributes:
        device: where the matrices are.
        has_parts: whether the P of any matrix is divided over several ranks.
        lefts: for each block of the plan the rows of P, (columns, r), that belong to its columns.
        projections: for each block of the plan its rows of R, (rows, r).
    """

    def __init__(self, plan: Plan, groups: Groups, device: torch.device) -> None:
        self._plan = plan
        self._groups = groups
        self.device = device
        self._wire = TORCH_DTYPES[plan.layout.config.comm_dtype]
        self._left = Reducer(plan.left, plan.matrices, groups, device, self._wire)
        self._sections = [
            Section(tile.matrix, tile.start, view) for tile, view in self._left.sum_views
        ]
        self._assembled = self._assemble_left()
        self.lefts = self._left_factors()
        self._rows, self.projections = _row_memory(plan, device)
        partial = sum(
            view.numel()
            for held, view in zip(plan.held, self.projections, strict=True)
            if plan.has_partial_rows(held)
        )
        self._partial_rows = self._rows[:partial]
        self._gathered = GatheredColumns(plan, self.projections, groups, device)
        self._shared_rows = SharedRows(plan, self.projections, groups.data, device, self._wire)
        self.has_parts = bool(plan.part_sums)
        self._part_sums = [self._reducer(sums) for sums in plan.part_sums]
        self._grams = None if plan.grams is None else self._reducer(plan.grams, torch.float64)

    def clear_left(self) -> None:
        for memory in (self._left.tiles, *(values for _, values in self._assembled.values())):
            memory.zero_()

    def gather_right(self) -> Steps:
        yield from self._gathered.gather()

    def sum_left(self) -> Generator[None, None, list[Section]]:
        self._left.put(self._assembled)
        yield from self._left.sum()
        yield from self._average([section.values for section in self._sections])
        return self._sections

    def spread_left(self) -> Steps:
        values = [section.values for section in self._sections]
        if self._wire != torch.float32:
            # Whoever is in charge must use the same numbers as those to whom it sends them.
            copy_all(values, [view.to(self._wire) for view in values])
        yield from self._left.spread()
        self._left.take(self._assembled)

    def sum_parts(self, phase: int, parts: Sequence[tuple[int, Tensor]]) -> Steps:
        yield from self._part_sums[phase].all_reduce(parts)

    def sum_grams(self, grams: Sequence[tuple[int, Tensor]]) -> Steps:
        assert self._grams is not None
        yield from self._grams.all_reduce(grams)

    def redo_whole(
        self, broken: Sequence[Section], redo: Callable[[Tensor], Tensor]
    ) -> Generator[None, None, int]:
        divided = self._plan.divided
        flags = torch.zeros(len(divided), dtype=torch.int32, device=self.device)
        for section in broken:
            flags[divided.index(section.matrix)] = 1
        yield from self._reduce_over_grid(flags, dist.ReduceOp.MAX)
        agreed = [k for k, flag in zip(divided, flags.tolist(), strict=True) if flag]
        if not agreed:
            return 0
        reducer = self._reducer(self._plan.gathering(agreed))
        sections = {section.matrix: (section.start, section.values) for section in broken}
        reducer.put(sections)
        yield from reducer.sum()
        whole = [view for _, view in reducer.sum_views]
        for p in whole:
            p.copy_(redo(p))
        yield from reducer.spread()
        reducer.take(sections)
        return len(whole)

    def sum_rows(self) -> Steps:
        # Replicas first: later sums then give the copies of a row the same bits.
        yield from self._average([self._rows])
        yield from self._all_reduce(self._partial_rows, self._groups.tensor)
        yield from self._shared_rows.sum()

    def sum_norms(self, squares: Tensor) -> Steps:
        yield from self._reduce_over_grid(squares, dist.ReduceOp.SUM)

    def _reducer(self, reduction: Reduction, dtype: torch.dtype = torch.float32) -> "Reducer":
        return Reducer(reduction, self._plan.matrices, self._groups, self.device, dtype, dtype)

    def _reduce_over_grid(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Steps:
        for group in larger_than_one(self._groups.tensor, self._groups.data):
            yield from wait_for(dist.all_reduce(tensor, op, group=group, async_op=True))

    def _average(self, tensors: Sequence[Tensor]) -> Steps:
        """Averages over the replicas, all tensors together."""
        if size_of(self._groups.replicas) == 1:
            return
        flat = torch.cat([torch.zeros(0, device=self.device), *(t.flatten() for t in tensors)])
        yield from self._all_reduce(flat, self._groups.replicas)
        flat /= size_of(self._groups.replicas)
        copy_all(tensors, like_views(flat, tensors))

    def _all_reduce(self, memory: Tensor, group: ProcessGroup | None) -> Steps:
        """Sums float32 memory over a group, in place, in the exchange's dtype."""
        if size_of(group) == 1:
            return
        sent = memory.to(self._wire)
        yield from wait_for(dist.all_reduce(sent, group=group, async_op=True))
        if sent is not memory:
            memory.copy_(sent)

    def _assemble_left(self) -> dict[int, tuple[int, Tensor]]:
        """Memory for the P of matrices of which this rank sends several tiles.

        For each of them its first row and (rows, r). The others' lies where it is sent from.
        """
        tiles: dict[int, list[Tile]] = {}
        for tile, _ in self._left.tile_views:
            tiles.setdefault(tile.matrix, []).append(tile)
        memory = {}
        for matrix, several in tiles.items():
            if len(several) > 1:
                start, stop = min(t.start for t in several), max(t.stop for t in several)
                shape = (stop - start, self._plan.matrices[matrix].rank)
                memory[matrix] = start, torch.zeros(shape, device=self.device)
        return memory

    def _left_factors(self) -> list[Tensor]:
        """For each block the rows of P that belong to its columns."""
        memory = {tile.matrix: (tile.start, view) for tile, view in self._left.tile_views}
        memory |= self._assembled
        found = []
        for held in self._plan.held:
            first, rows = memory[held.matrix]
            block = held.rectangle
            found.append(rows[block.column_start - first : block.column_stop - first])
        return found


def _row_memory(plan: Plan, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Memory of R, 1-D, and each block's (rows, r) of it, in the order of the plan."""
    shapes = [(held.rectangle.rows, plan.matrices[held.matrix].rank) for held in plan.held]
    sizes = [rows * rank for rows, rank in shapes]
    memory = torch.zeros(sum(sizes), device=device)
    parts = memory.split(sizes) if sizes else ()
    return memory, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
