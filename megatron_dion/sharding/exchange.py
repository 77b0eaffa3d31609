"""Carries out a plan with torch.distributed: the buffers, and the collectives between them.

The number of collectives of a step does not depend on the number of matrices; docs/design.md lists
them. Each is started, then the step yields, then it waits.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm import Matrix, Section, Steps
from megatron_dion.sharding.layout import Held
from megatron_dion.sharding.plan import Plan, SharedRow
from megatron_dion.sharding.reduction import Hop, Reduction, Tile

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Groups:
    """The process groups of a grid; None stands for a group of one.

    Attributes:
        tensor: tensor-parallel ranks.
        data: data-parallel ranks.
        replicas: ranks that hold the same pieces and see other gradients of which the mean counts.
    """

    tensor: ProcessGroup | None = None
    data: ProcessGroup | None = None
    replicas: ProcessGroup | None = None


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
        self._left = _Reducer(plan.left, plan.matrices, groups, device, self._wire)
        self._assembled = self._assemble_left()
        self.lefts = [self._left_of(held) for held in plan.held]
        self._rows, self.projections = _row_memory(plan, device)
        partial = sum(
            view.numel()
            for held, view in zip(plan.held, self.projections, strict=True)
            if plan.has_partial_rows(held)
        )
        self._partial_rows = self._rows[:partial]
        self._gathered = _GatheredColumns(plan, self.projections, groups, device)
        self._shared_rows = _SharedRowBuffers(
            plan, self.projections, groups.data, device, self._wire
        )
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
        sections = [
            Section(tile.matrix, tile.start, view) for tile, view in self._left.summed_tiles()
        ]
        values = [section.values for section in sections]
        yield from self._average(values)
        return sections

    def spread_left(self) -> Steps:
        sections = [view for _, view in self._left.summed_tiles()]
        if self._wire != torch.float32 and sections:
            # Whoever is in charge must use the same numbers as those to whom it sends them.
            torch._foreach_copy_(sections, [view.to(self._wire) for view in sections])
        yield from self._left.spread()
        self._left.take(self._assembled)

    def sum_parts(self, phase: int, parts: Sequence[tuple[int, Tensor]]) -> Steps:
        yield from _sum_for_all(self._part_sums[phase], parts)

    def sum_grams(self, grams: Sequence[tuple[int, Tensor]]) -> Steps:
        assert self._grams is not None
        yield from _sum_for_all(self._grams, grams)

    def redo_whole(
        self, broken: Sequence[Section], redo: Callable[[Tensor], Tensor]
    ) -> Generator[None, None, int]:
        divided = self._plan.divided
        flags = torch.zeros(len(divided), dtype=torch.int32, device=self.device)
        for section in broken:
            flags[divided.index(section.matrix)] = 1
        for group in _larger_than_one(self._groups.tensor, self._groups.data):
            yield from _wait_for(
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=group, async_op=True)
            )
        agreed = [k for k, flag in zip(divided, flags.tolist(), strict=True) if flag]
        if not agreed:
            return 0
        reducer = self._reducer(self._plan.gathering(agreed))
        sections = {section.matrix: (section.start, section.values) for section in broken}
        reducer.put(sections)
        yield from reducer.sum()
        whole = [view for _, view in reducer.summed_tiles()]
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
        for group in _larger_than_one(self._groups.tensor, self._groups.data):
            yield from _wait_for(dist.all_reduce(squares, group=group, async_op=True))

    def _reducer(self, reduction: Reduction, dtype: torch.dtype = torch.float32) -> "_Reducer":
        return _Reducer(reduction, self._plan.matrices, self._groups, self.device, dtype, dtype)

    def _average(self, tensors: Sequence[Tensor]) -> Steps:
        """Averages over the replicas, all tensors together."""
        if _size(self._groups.replicas) == 1:
            return
        flat = torch.cat([torch.zeros(0, device=self.device), *(t.flatten() for t in tensors)])
        yield from self._all_reduce(flat, self._groups.replicas)
        flat /= _size(self._groups.replicas)
        _copy(tensors, _like_views(flat, tensors))

    def _all_reduce(self, memory: Tensor, group: ProcessGroup | None) -> Steps:
        """Sums float32 memory over a group, in place, in the exchange's dtype."""
        if _size(group) == 1:
            return
        sent = memory.to(self._wire)
        yield from _wait_for(dist.all_reduce(sent, group=group, async_op=True))
        if sent is not memory:
            memory.copy_(sent)

    def _assemble_left(self) -> dict[int, tuple[int, Tensor]]:
        """Memory for the P of matrices of which this rank sends several tiles.

        For each of them its first row and (rows, r). The others' lies where it is sent from.
        """
        tiles: dict[int, list[Tile]] = {}
        for tile in self._left.hop_tiles():
            tiles.setdefault(tile.matrix, []).append(tile)
        memory = {}
        for matrix, several in tiles.items():
            if len(several) > 1:
                start, stop = min(t.start for t in several), max(t.stop for t in several)
                shape = (stop - start, self._plan.matrices[matrix].rank)
                memory[matrix] = start, torch.zeros(shape, device=self.device)
        return memory

    def _left_of(self, held: Held) -> Tensor:
        if held.matrix in self._assembled:
            first, rows = self._assembled[held.matrix]
        else:
            first, rows = self._left.only_tile(held.matrix)
        block = held.rectangle
        return rows[block.column_start - first : block.column_stop - first]


class _Reducer:
    """The memory of a `Reduction`, and its two directions."""

    def __init__(
        self,
        reduction: Reduction,
        matrices: Sequence[Matrix],
        groups: Groups,
        device: torch.device,
        wire: torch.dtype,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        near, far = reduction.tensor_hop, reduction.data_hop
        # The far hop sends from the memory into which the near one sums.
        between = _own_last(far.sends, _rank(groups.data))
        memory = _Memory([matrix.rank for matrix in matrices], device, wire, dtype)
        self._near = _HopBuffers(near, memory, groups.tensor, sums=between)
        self._far = _HopBuffers(far, memory, groups.data, source=self._near.sums)
        self.tiles = self._near.tiles
        self._only_tiles = {tile.matrix: (tile.start, v) for tile, v in self._near.tile_views}

    def hop_tiles(self) -> list[Tile]:
        """What this rank contributes."""
        return [tile for tile, _ in self._near.tile_views]

    def summed_tiles(self) -> list[tuple[Tile, Tensor]]:
        """What this rank is in charge of."""
        return self._far.sum_views

    def only_tile(self, matrix: int) -> tuple[int, Tensor]:
        """First row and memory of the tile of a matrix that has only one here."""
        return self._only_tiles[matrix]

    def put(self, rows: dict[int, tuple[int, Tensor]]) -> None:
        """Copies rows of matrices, from the given first row on, into their tiles."""
        tiles, values = self._match(rows)
        _copy(tiles, values)

    def take(self, rows: dict[int, tuple[int, Tensor]]) -> None:
        """The way back."""
        tiles, values = self._match(rows)
        _copy(values, tiles)

    def _match(self, rows: dict[int, tuple[int, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [
            (view, rows[tile.matrix][1][tile.start - rows[tile.matrix][0] :][: view.shape[0]])
            for tile, view in self._near.tile_views
            if tile.matrix in rows
        ]
        return [tile for tile, _ in pairs], [values for _, values in pairs]

    def sum(self) -> Steps:
        yield from self._near.sum()
        yield from self._far.sum()

    def spread(self) -> Steps:
        yield from self._far.spread()
        yield from self._near.spread()


@dataclass(frozen=True)
class _Memory:
    """What all memory of a reduction has in common; `ranks` are the widths r of all matrices."""

    ranks: Sequence[int]
    device: torch.device
    wire: torch.dtype
    dtype: torch.dtype

    def numel(self, tiles: Iterable[Tile]) -> int:
        return sum((tile.stop - tile.start) * self.ranks[tile.matrix] for tile in tiles)

    def zeros(self, tiles: Iterable[Tile]) -> Tensor:
        return torch.zeros(self.numel(tiles), dtype=self.dtype, device=self.device)

    def views(self, buffer: Tensor, tiles: Sequence[Tile]) -> list[tuple[Tile, Tensor]]:
        """Tiles with their (rows, r), which lie one behind the other in a buffer."""
        shapes = [(tile.stop - tile.start, self.ranks[tile.matrix]) for tile in tiles]
        sizes = [rows * rank for rows, rank in shapes]
        parts = buffer[: sum(sizes)].split(sizes) if sizes else ()
        return [
            (tile, part.view(shape)) for tile, part, shape in zip(tiles, parts, shapes, strict=True)
        ]


class _HopBuffers:
    """The memory of a `Hop`. What a rank has for itself stands last and is not sent.

    With a single rank, tiles and sums are one.

    Args:
        hop: what is sent, received and summed.
        memory: describes all memory.
        group: the ranks.
        source: memory of the tiles, where it is there already.
        sums: the order of the sums in one contiguous memory; without it, a sum to which only this
            rank contributes stays where it is.
    """

    def __init__(
        self,
        hop: Hop,
        memory: _Memory,
        group: ProcessGroup | None,
        source: Tensor | None = None,
        sums: Sequence[Tile] | None = None,
    ) -> None:
        self._group = group
        me = _rank(group)
        sends, receives = _without(hop.sends, me), _without(hop.receives, me)
        self._send_sizes = [memory.numel(tiles) for tiles in sends]
        self._receive_sizes = [memory.numel(tiles) for tiles in receives]
        order = sums if sums is not None and _size(group) == 1 else _own_last(hop.sends, me)
        self.tiles = memory.zeros(order) if source is None else source
        self.tile_views = memory.views(self.tiles, order)
        if _size(group) == 1:
            self.sums, self.sum_views = self.tiles, self.tile_views
            return
        self._outgoing = self.tiles[: sum(self._send_sizes)]
        self._sent = self._outgoing.to(memory.wire)
        received = torch.zeros(sum(self._receive_sizes), dtype=memory.wire, device=memory.device)
        self._received = received
        own = {_key(tile): (tile, view) for tile, view in self.tile_views}
        arriving = [tile for tiles in receives for tile in tiles]
        stay = set() if sums is not None else own.keys() - {_key(tile) for tile in arriving}
        moved = [tile for tile in sums or hop.sums if _key(tile) not in stay]
        self.sums = memory.zeros(moved)
        place = {_key(tile): (tile, view) for tile, view in memory.views(self.sums, moved)}
        self.sum_views = [place.get(_key(tile)) or own[_key(tile)] for tile in sums or hop.sums]
        arrived = [
            memory.views(buffer, tiles)
            for buffer, tiles in zip(received.split(self._receive_sizes), receives, strict=True)
        ]
        arrived[me] = [own[_key(tile)] for tile in hop.receives[me] if _key(tile) not in stay]
        self._arrivals = [_match(tiles, place) for tiles in arrived]

    def sum(self) -> Steps:
        """Sends all tiles and adds up what arrives, in the order of the peers."""
        if _size(self._group) == 1:
            return
        if self._sent.dtype != self._outgoing.dtype:
            self._sent.copy_(self._outgoing)
        yield from _all_to_all(
            self._received, self._sent, self._receive_sizes, self._send_sizes, self._group
        )
        self.sums.zero_()
        for arrived, targets in self._arrivals:
            if arrived:
                torch._foreach_add_(targets, arrived)

    def spread(self) -> Steps:
        """The way back: overwrites the tiles with the rows of the sums that they contribute to."""
        if _size(self._group) == 1:
            return
        for arrived, targets in self._arrivals:
            _copy(arrived, targets)
        yield from _all_to_all(
            self._sent, self._received, self._send_sizes, self._receive_sizes, self._group
        )
        if self._sent.dtype != self._outgoing.dtype:
            self._outgoing.copy_(self._sent)


class _GatheredColumns:
    """Brings together the columns of Q that tensor-parallel ranks keep of the rows they share."""

    def __init__(
        self,
        plan: Plan,
        projections: Sequence[Tensor],
        groups: Groups,
        device: torch.device,
    ) -> None:
        self._group = groups.tensor
        if _size(self._group) == 1:
            return
        size = plan.layout.grid.tensor_parallel_size
        self._mine: list[Tensor] = []
        self._theirs: list[list[Tensor]] = [[] for _ in range(size)]
        for held, view in zip(plan.held, projections, strict=True):
            if plan.has_partial_rows(held):
                for peer in plan.layout.grid.tensor_group(plan.rank):
                    columns = plan.layout.share(held.placement, view.shape[1], peer)
                    self._theirs[peer.tensor_parallel].append(view[:, columns])
        # Shares differ by a column at most; each rank's place is as large as the largest.
        numel = max(sum(view.numel() for view in views) for views in self._theirs)
        dtype = TORCH_DTYPES[plan.layout.config.factor_dtype]
        self._sent = torch.zeros(numel, dtype=dtype, device=device)
        self._received = torch.zeros(size * numel, dtype=dtype, device=device)
        self._mine = self._theirs[plan.rank.tensor_parallel]
        self._places = [
            _like_views(buffer, views)
            for buffer, views in zip(self._received.view(size, numel), self._theirs, strict=True)
        ]
        self._place = _like_views(self._sent, self._mine)

    def gather(self) -> Steps:
        if _size(self._group) == 1:
            return
        _copy(self._place, self._mine)
        yield from _wait_for(
            dist.all_gather_into_tensor(
                self._received, self._sent, group=self._group, async_op=True
            )
        )
        for views, places in zip(self._theirs, self._places, strict=True):
            _copy(views, places)


class _SharedRowBuffers:
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
        if _size(group) == 1:
            return
        starts = {
            (held.matrix, held.rectangle.row_start): view
            for held, view in zip(plan.held, projections, strict=True)
        }

        def row_views(rows: Iterable[SharedRow]) -> list[Tensor]:
            return [starts[shared.matrix, shared.row][0] for shared in rows]  # each (r,)

        mine = sorted({(row.matrix, row.row) for peer in plan.shared_rows for row in peer})
        self._mine = row_views(SharedRow(*key) for key in mine)
        self._kept = [torch.empty_like(view) for view in self._mine]
        self._parts = [row_views(rows) for rows in plan.shared_rows]
        self._sizes = [sum(view.numel() for view in views) for views in self._parts]
        self._sent = torch.zeros(sum(self._sizes), dtype=wire, device=device)
        self._received = torch.zeros_like(self._sent)
        self._sent_views = _like_views(self._sent, [v for views in self._parts for v in views])
        self._received_views = [
            _like_views(buffer, views)
            for buffer, views in zip(self._received.split(self._sizes), self._parts, strict=True)
        ]

    def sum(self) -> Steps:
        if _size(self._group) == 1:
            return
        if self._sent.dtype != torch.float32:
            _copy(self._mine, [view.to(self._sent.dtype) for view in self._mine])
        _copy(self._sent_views, [view for views in self._parts for view in views])
        yield from _all_to_all(self._received, self._sent, self._sizes, self._sizes, self._group)
        if not self._mine:
            return
        torch._foreach_copy_(self._kept, self._mine)
        torch._foreach_zero_(self._mine)
        for peer, (views, received) in enumerate(
            zip(self._parts, self._received_views, strict=True)
        ):
            if peer == dist.get_rank(self._group):
                torch._foreach_add_(self._mine, self._kept)
            elif views:
                torch._foreach_add_(views, received)


def _row_memory(plan: Plan, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Memory of R, 1-D, and each block's (rows, r) of it, in the order of the plan."""
    shapes = [(held.rectangle.rows, plan.matrices[held.matrix].rank) for held in plan.held]
    sizes = [rows * rank for rows, rank in shapes]
    memory = torch.zeros(sum(sizes), device=device)
    parts = memory.split(sizes) if sizes else ()
    return memory, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _sum_for_all(reducer: _Reducer, tensors: Sequence[tuple[int, Tensor]]) -> Steps:
    """Sums (matrix, (rows, r)) over those who have one for the matrix, in place."""
    whole = {matrix: (0, tensor) for matrix, tensor in tensors}
    reducer.put(whole)
    yield from reducer.sum()
    yield from reducer.spread()
    reducer.take(whole)


def _all_to_all(
    received: Tensor,
    sent: Tensor,
    receive_sizes: list[int],
    send_sizes: list[int],
    group: ProcessGroup | None,
) -> Steps:
    work = dist.all_to_all_single(
        received, sent, receive_sizes, send_sizes, group=group, async_op=True
    )
    yield from _wait_for(work)


def _wait_for(work: dist.Work | None) -> Steps:
    yield
    assert work is not None
    work.wait()


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def _larger_than_one(*groups: ProcessGroup | None) -> list[ProcessGroup]:
    return [group for group in groups if group is not None and group.size() > 1]


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _without(tiles: Sequence[tuple[Tile, ...]], peer: int) -> list[tuple[Tile, ...]]:
    return [() if index == peer else found for index, found in enumerate(tiles)]


def _own_last(tiles: Sequence[tuple[Tile, ...]], me: int) -> list[Tile]:
    return [*(tile for found in _without(tiles, me) for tile in found), *tiles[me]]


def _key(tile: Tile) -> tuple[int, int]:
    return tile.matrix, tile.charge


def _match(
    arrived: Sequence[tuple[Tile, Tensor]], place: dict[tuple[int, int], tuple[Tile, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Tiles, and the rows of the sums to which they belong."""
    targets = []
    for tile, _ in arrived:
        whole, view = place[_key(tile)]
        targets.append(view[tile.start - whole.start : tile.stop - whole.start])
    return [view for _, view in arrived], targets


def _like_views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of consecutive parts of a buffer with the shapes of the tensors."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = buffer[: sum(sizes)].split(sizes) if tensors else ()
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
