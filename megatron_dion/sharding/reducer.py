"""Carries out a reduction: the memory of its tiles, and its two hops there and back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm import Matrix, Steps, copy_all
from megatron_dion.sharding.buffers import Buffers
from megatron_dion.sharding.collectives import Groups, all_to_all, give_way, rank_in
from megatron_dion.sharding.reduction import Hop, Reduction, Tile


class Reducer:
    """The memory of a `Reduction`, and its two directions.

    Attributes:
        held: the memory of the tiles.
        transit: all other memory, needed from `sum` to `spread`; some of the sums are in it.
        tiles: 1-D, all that this rank contributes.
        tile_views: its tiles, with their (rows, r).
        sum_views: what this rank is in charge of, with their (rows, r).
    """

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
        between = _own_last(far.sends, rank_in(groups.data))
        self.held, self.transit = Buffers(device), Buffers(device)
        ranks = [matrix.rank for matrix in matrices]
        memory = _Memory(ranks, self.held, self.transit, wire, dtype)
        self._near = HopBuffers(near, memory, groups.tensor, sums=between)
        self._far = HopBuffers(far, memory, groups.data, source=self._near.sums)
        self.tiles = self._near.tiles
        self.tile_views = self._near.tile_views
        self.sum_views = self._far.sum_views
        self.held.free()
        self.transit.free()

    def put(self, rows: dict[int, tuple[int, Tensor]]) -> None:
        """Copies rows of matrices, from the given first row on, into their tiles."""
        tiles, values = self._match(rows)
        copy_all(tiles, values)

    def take(self, rows: dict[int, tuple[int, Tensor]]) -> None:
        """The way back."""
        tiles, values = self._match(rows)
        copy_all(values, tiles)

    def _match(self, rows: dict[int, tuple[int, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [
            (view, rows[tile.matrix][1][tile.start - rows[tile.matrix][0] :][: view.shape[0]])
            for tile, view in self.tile_views
            if tile.matrix in rows
        ]
        return [tile for tile, _ in pairs], [values for _, values in pairs]

    def sum(self) -> Steps:
        yield from self._near.sum()
        yield from self._far.sum()

    def spread(self) -> Steps:
        yield from self._far.spread()
        yield from self._near.spread()

    def all_reduce(self, tensors: Sequence[tuple[int, Tensor]]) -> Steps:
        """Sums (matrix, (rows, r)) over those who have one for the matrix, in place."""
        whole = {matrix: (0, tensor) for matrix, tensor in tensors}
        with self.held.allocated(), self.transit.allocated():
            self.put(whole)
            yield from self.sum()
            yield from self.spread()
            self.take(whole)


@dataclass(frozen=True)
class _Memory:
    """What all memory of a reduction has in common; `ranks` are the widths r of all matrices."""

    ranks: Sequence[int]
    held: Buffers
    transit: Buffers
    wire: torch.dtype
    dtype: torch.dtype

    def numel(self, tiles: Iterable[Tile]) -> int:
        return sum((tile.stop - tile.start) * self.ranks[tile.matrix] for tile in tiles)

    def views(self, buffer: Tensor, tiles: Sequence[Tile]) -> list[tuple[Tile, Tensor]]:
        """Tiles with their (rows, r), which lie one behind the other in a buffer."""
        shapes = [(tile.stop - tile.start, self.ranks[tile.matrix]) for tile in tiles]
        sizes = [rows * rank for rows, rank in shapes]
        parts = buffer[: sum(sizes)].split(sizes) if sizes else ()
        return [
            (tile, part.view(shape)) for tile, part, shape in zip(tiles, parts, shapes, strict=True)
        ]


class HopBuffers:
    """The memory of a `Hop`. What a rank has for itself stands last and is not sent.

    Where no rank sends anything, tiles and sums are one.

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
        me = rank_in(group)
        sends, receives = _without(hop.sends, me), _without(hop.receives, me)
        self._send_sizes = [memory.numel(tiles) for tiles in sends]
        self._receive_sizes = [memory.numel(tiles) for tiles in receives]
        self._is_silent = hop.is_silent
        order = sums if sums is not None and hop.is_silent else _own_last(hop.sends, me)
        if source is None:
            source = memory.held.empty(memory.numel(order), memory.dtype)
        self.tiles = source
        self.tile_views = memory.views(self.tiles, order)
        if hop.is_silent:
            self.sums, self.sum_views = self.tiles, self.tile_views
            return
        self._outgoing = self.tiles[: sum(self._send_sizes)]
        self._sent = self._outgoing
        if memory.wire != memory.dtype:
            self._sent = memory.transit.empty(self._outgoing.numel(), memory.wire)
        received = memory.transit.empty(sum(self._receive_sizes), memory.wire)
        self._received = received
        own = {tile.key: (tile, view) for tile, view in self.tile_views}
        arriving = [tile for tiles in receives for tile in tiles]
        stay = set() if sums is not None else own.keys() - {tile.key for tile in arriving}
        moved = [tile for tile in sums or hop.sums if tile.key not in stay]
        self.sums = memory.transit.empty(memory.numel(moved), memory.dtype)
        place = {tile.key: (tile, view) for tile, view in memory.views(self.sums, moved)}
        self.sum_views = [place.get(tile.key) or own[tile.key] for tile in sums or hop.sums]
        arrived = [
            memory.views(buffer, tiles)
            for buffer, tiles in zip(received.split(self._receive_sizes), receives, strict=True)
        ]
        arrived[me] = [own[tile.key] for tile in hop.receives[me] if tile.key not in stay]
        self._arrivals = [_match(tiles, place) for tiles in arrived]

    def sum(self) -> Steps:
        """Sends all tiles and adds up what arrives, in the order of the peers."""
        if self._is_silent:
            yield from give_way(self._group)
            return
        if self._sent is not self._outgoing:
            self._sent.copy_(self._outgoing)
        yield from all_to_all(
            self._received, self._sent, self._receive_sizes, self._send_sizes, self._group
        )
        self.sums.zero_()
        for arrived, targets in self._arrivals:
            if arrived:
                torch._foreach_add_(targets, arrived)

    def spread(self) -> Steps:
        """The way back: overwrites the tiles with the rows of the sums that they contribute to."""
        if self._is_silent:
            yield from give_way(self._group)
            return
        for arrived, targets in self._arrivals:
            copy_all(arrived, targets)
        yield from all_to_all(
            self._sent, self._received, self._send_sizes, self._receive_sizes, self._group
        )
        if self._sent is not self._outgoing:
            self._outgoing.copy_(self._sent)


def _without(tiles: Sequence[tuple[Tile, ...]], peer: int) -> list[tuple[Tile, ...]]:
    return [() if index == peer else found for index, found in enumerate(tiles)]


def _own_last(tiles: Sequence[tuple[Tile, ...]], me: int) -> list[Tile]:
    return [*(tile for found in _without(tiles, me) for tile in found), *tiles[me]]


def _match(
    arrived: Sequence[tuple[Tile, Tensor]], place: dict[tuple[int, int], tuple[Tile, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Tiles, and the rows of the sums to which they belong."""
    targets = []
    for tile, _ in arrived:
        whole, view = place[tile.key]
        targets.append(view[tile.start - whole.start : tile.stop - whole.start])
    return [view for _, view in arrived], targets
