"""Carries out a plan with torch.distributed: the buffers, and the collectives between them.

The number of collectives of a step does not depend on the number of matrices; docs/design.md lists
them. Each is started, then the step yields, then it waits.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm import Section, Stack, Steps, copy_all
from megatron_dion.sharding.buffers import Buffers
from megatron_dion.sharding.collectives import (
    TORCH_DTYPES,
    Groups,
    give_way,
    larger_than_one,
    like_views,
    size_of,
    wait_for,
)
from megatron_dion.sharding.plan import Plan
from megatron_dion.sharding.reducer import Reducer
from megatron_dion.sharding.reduction import Reduction
from megatron_dion.sharding.shared_rows import GatheredColumns, SharedRows
from megatron_dion.sharding.traffic import numel_of_rows


class ShardedExchange:
    """The exchange of one rank of a grid (`megatron_dion.algorithm.Exchange`).

    Its buffers have memory within `allocated` only; `sharding/memory.py` counts it.

    Args:
        plan: of this rank.
        groups: the processes; P and R are averaged over replicas.
        device: where the matrices are.

    Attributes:
        device: where the matrices are.
        divided: matrices whose P is orthonormalized by sums over several ranks, and the method.
        merged: matrices whose P is orthonormalized by triangles of its sections.
        lefts: for each block of the plan the rows of P, (columns, r), that belong to its columns.
        projections: for each block of the plan its rows of R, (rows, r).
    """

    def __init__(self, plan: Plan, groups: Groups, device: torch.device) -> None:
        self._plan = plan
        self._groups = groups
        self._replicas = size_of(groups.replicas)
        self.device = device
        self._wire = TORCH_DTYPES[plan.layout.config.comm_dtype]
        self._memory = Buffers(device)
        self._left = Reducer(plan.left, plan.matrices, groups, device, self._wire)
        self._sections = [
            Section(tile.matrix, tile.start, view) for tile, view in self._left.sum_views
        ]
        self._sections_sent = self._sections_in_transit()
        self._assembled = self._assemble_left()
        with self._left.held.allocated():
            self.lefts = self._left_factors()
        self._partial_rows, self._other_rows, self.projections = self._row_memory()
        self._rows_transit = Buffers(device)
        self._share_of_rows, self._rows_sent = self._rows_in_transit()
        self._gathered = GatheredColumns(plan, self.projections, groups, device)
        self._shared_rows = SharedRows(plan, self.projections, groups.data, device, self._wire)
        self.divided: Mapping[int, str] = {k: plan.layout.part_method(k) for k in plan.divided}
        self._part_sums = {
            method: [self._reducer(sums) for sums in phases]
            for method, phases in plan.part_sums.items()
        }
        self.merged = frozenset(plan.merged)
        self._merging = self._reducer(plan.merging(plan.merged))
        self._right = self._reducer(plan.right, torch.float64)
        for buffers in (self._memory, self._left.transit, self._rows_transit):
            buffers.free()

    @contextmanager
    def allocated(self) -> Iterator[None]:
        """For the time of a step."""
        with self._memory.allocated(), self._left.held.allocated():
            try:
                yield
            finally:
                self._left.transit.free()

    def clear_left(self) -> None:
        for memory in (self._left.tiles, *(values for _, values in self._assembled.values())):
            memory.zero_()

    def gather_right(self) -> Steps:
        yield from self._gathered.gather()

    def sum_left(self) -> Generator[None, None, list[Section]]:
        self._left.put(self._assembled)
        self._left.transit.allocate()
        yield from self._left.sum()
        yield from self._average_sections()
        return self._sections

    def spread_left(self) -> Steps:
        values = [section.values for section in self._sections]
        if self._wire != torch.float32:
            # Whoever is in charge must use the same numbers as those to whom it sends them.
            copy_all(values, [view.to(self._wire) for view in values])
        yield from self._left.spread()
        self._left.transit.free()
        self._left.take(self._assembled)

    def sum_parts(self, method: str, phase: int, parts: Sequence[tuple[int, Tensor]]) -> Steps:
        yield from self._part_sums[method][phase].all_reduce(parts)

    def sum_right(self, sums: Sequence[tuple[int, Tensor]]) -> Steps:
        yield from self._right.all_reduce(sums)

    def agree(self, broken: Collection[int]) -> Generator[None, None, list[int]]:
        flags = torch.tensor(
            [k in broken for k in self.divided], dtype=torch.int32, device=self.device
        )
        # All ranks, so that all make the same calls in the same order, also those of other sets.
        for group in larger_than_one(self._groups.tensor, self._groups.data):
            yield from wait_for(
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=group, async_op=True)
            )
        return [k for k, flag in zip(self.divided, flags.tolist(), strict=True) if flag]

    def merge(
        self,
        matrices: Collection[int],
        triangles: Sequence[tuple[int, Tensor]],
        join: Callable[[Sequence[Stack]], int],
    ) -> Generator[None, None, int]:
        plan = self._plan
        is_planned = set(matrices) == self.merged
        reducer = self._merging
        if not is_planned:
            reducer = self._reducer(plan.merging(matrices))
        with reducer.held.allocated(), reducer.transit.allocated():
            # Of a matrix no rank has two sections.
            tiles = {tile.matrix: view for tile, view in reducer.tile_views}
            mine = [tiles[matrix] for matrix, _ in triangles]
            values = [triangle for _, triangle in triangles]
            copy_all(mine, values)
            yield from reducer.sum()
            stacks: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
            for tile, view in sorted(reducer.sum_views, key=lambda item: item[0].charge):
                charge = plan.charges[tile.matrix][tile.charge]
                stacks[tile.matrix].append((charge.stop - charge.start, view))
            result = join([Stack(k, *zip(*stacks[k], strict=True)) for k in sorted(stacks)])
            yield from reducer.spread()
            copy_all(values, mine)
        return result

    def sum_rows(self) -> Steps:
        with self._rows_transit.allocated():
            if self._replicas > 1:
                yield from self._average_rows()
            elif self._plan.has_partial_rows:
                yield from self._all_reduce(self._partial_rows, self._groups.tensor)
            else:
                yield from give_way(self._groups.tensor)
        # Last, so that the copies of a row have the same bits.
        yield from self._shared_rows.sum()

    def _reducer(self, reduction: Reduction, dtype: torch.dtype = torch.float32) -> Reducer:
        return Reducer(reduction, self._plan.matrices, self._groups, self.device, dtype, dtype)

    def _average_sections(self) -> Steps:
        """Averages P in charge over the replicas, all sections together."""
        if self._replicas == 1:
            return
        values = [section.values for section in self._sections]
        sent = like_views(self._sections_sent, values)
        copy_all(sent, values)
        yield from self._all_reduce_in_place(self._sections_sent, self._groups.replicas)
        copy_all(values, sent)
        for value in values:
            value /= self._replicas

    def _average_rows(self) -> Steps:
        tensor, replicas = self._groups.tensor, self._groups.replicas
        if self._plan.has_partial_rows:
            # Of what they sum, each averages a share: it goes to the replicas once.
            share = self._share_of_rows
            with self._as_sent(self._partial_rows) as sent:
                yield from wait_for(
                    dist.reduce_scatter_tensor(share, sent, group=tensor, async_op=True)
                )
                yield from self._all_reduce_in_place(share, replicas)
                yield from wait_for(
                    dist.all_gather_into_tensor(sent, share, group=tensor, async_op=True)
                )
        yield from self._all_reduce(self._other_rows, replicas)
        for rows in (self._partial_rows, self._other_rows):
            rows /= self._replicas

    def _all_reduce(self, rows: Tensor, group: ProcessGroup | None) -> Steps:
        if size_of(group) > 1:
            with self._as_sent(rows) as sent:
                yield from self._all_reduce_in_place(sent, group)

    def _all_reduce_in_place(self, tensor: Tensor, group: ProcessGroup | None) -> Steps:
        yield from wait_for(dist.all_reduce(tensor, group=group, async_op=True))

    @contextmanager
    def _as_sent(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows in the exchange's dtype; in the end they have what it has."""
        if self._wire == torch.float32:
            yield rows
            return
        sent = self._rows_sent[: rows.numel()]
        sent.copy_(rows)
        yield sent
        rows.copy_(sent)

    def _sections_in_transit(self) -> Tensor:
        """What replicas exchange of P."""
        numel = sum(section.values.numel() for section in self._sections)
        return self._left.transit.empty(numel if self._replicas > 1 else 0, self._wire)

    def _rows_in_transit(self) -> tuple[Tensor, Tensor]:
        """A tensor-parallel rank's share of R to average; R where it is sent in another dtype."""
        partial, other = len(self._partial_rows), len(self._other_rows)
        is_averaged = self._replicas > 1
        share = partial // size_of(self._groups.tensor) if is_averaged else 0
        largest = max(partial, other) if is_averaged else partial
        return (
            self._rows_transit.empty(share, self._wire),
            self._rows_transit.empty(0 if self._wire == torch.float32 else largest, self._wire),
        )

    def _assemble_left(self) -> dict[int, tuple[int, Tensor]]:
        """Memory for the P of matrices of which this rank sends several tiles.

        For each of them its first row and (rows, r). The others' lies where it is sent from.
        """
        memory = {}
        for matrix, (start, stop) in self._plan.assembled.items():
            rank = self._plan.matrices[matrix].rank
            values = self._memory.empty((stop - start) * rank, torch.float32)
            memory[matrix] = start, values.view(stop - start, rank)
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

    def _row_memory(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Memory of R, 1-D, and each block's (rows, r) of it, in the order of the plan.

        First is R that tensor-parallel ranks sum, after as many unused numbers as make it divisible
        into equal shares.
        """
        plan = self._plan
        shapes = [(held.rectangle.rows, plan.matrices[held.matrix].rank) for held in plan.held]
        sizes = [rows * rank for rows, rank in shapes]
        partial = numel_of_rows(plan, filter(plan.is_partial, plan.held))
        unused = -partial % size_of(self._groups.tensor) if self._replicas > 1 else 0
        memory = self._memory.empty(unused + sum(sizes), torch.float32)
        parts = memory[unused:].split(sizes) if sizes else ()
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return memory[: unused + partial], memory[unused + partial :], views
