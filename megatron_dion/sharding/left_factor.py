"""Sums P over a grid and spreads it again: its memory, and its hops there and back."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm.exchange import Steps
from megatron_dion.algorithm.step import copy_all, views_in
from megatron_dion.sharding.buffers import Buffers
from megatron_dion.sharding.collectives import Setup, all_reduce, all_to_all, ring_bytes
from megatron_dion.sharding.plan import Hop, Tile

_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Numbers of P that are orthonormalized together: 1 MiB, what a CPU's cache holds; 128 MiB."""


class LeftFactorExchange:
    """The P of a step.

    `memory` is for what lasts from the first product to the last, `transit` for what lasts from
    `sum` to `spread`. `of_rectangles` are the rows of P, (columns, r), of each rectangle's columns;
    `batches` the rows that this rank orthonormalizes, (batch, rows, r), by shape.
    """

    def __init__(self, setup: Setup, memory: Buffers, transit: Buffers) -> None:
        plan, groups, replicas, wire, _ = setup
        self._wire = wire
        self._replicas = groups.replicas
        self._replica_count = replicas
        ranks = [matrix.rank for matrix in plan.layout.matrices]
        self._contributed = source = _Rows(plan.tiles, ranks, memory)
        self._hops: list[tuple[str, _HopExchange]] = []
        rank, self._tensor_size = plan.rank, plan.layout.grid.tensor_parallel_size
        for name, hop, me, group in (
            ("tensor", plan.tensor_hop, rank.tensor_parallel, groups.tensor),
            ("data", plan.slice_hop, rank.data_parallel, groups.data),
            ("data", plan.owner_hop, rank.data_parallel, groups.data),
        ):
            if hop is not None and len(hop.sends) > 1:
                sums = _Rows(hop.sums, ranks, transit)
                exchange = _HopExchange(hop, me, source, sums, group, transit, wire)
                self._hops.append((name, exchange))
                source = sums
        self._owned = source.memory
        self.batches = list(source.batches())
        self.gram_bytes = 4 * sum(len(p) * p.shape[2] ** 2 for p in self.batches)
        is_cast = replicas > 1 and wire != torch.float32
        self._averaged = transit.empty(len(self._owned), wire) if is_cast else self._owned
        self.of_rectangles = [
            self._contributed.view(Tile(rectangle.matrix, *rectangle.column_range))
            for _, rectangle in plan.rectangles
        ]

    def clear(self) -> None:
        """Sets what this rank contributes to zero."""
        self._contributed.memory.zero_()

    def sum(self) -> Steps:
        """Sums all tiles at the owners of their rows, and takes the mean over replicas."""
        for _, hop in self._hops:
            yield from hop.sum()
        if self._replica_count > 1:
            if self._averaged is not self._owned:
                self._averaged.copy_(self._owned)
            yield from all_reduce(self._averaged, self._replicas)
            torch.div(self._averaged, self._replica_count, out=self._owned)

    def spread(self) -> Steps:
        """Sends the owned rows, now orthonormalized, to all ranks that contributed to them."""
        if self._wire != torch.float32:
            # The owner must use the same numbers as those to whom it sends them.
            self._owned.copy_(self._owned.to(self._wire))
        for _, hop in reversed(self._hops):
            yield from hop.spread()

    def bytes_sent(self) -> Counter[str]:
        """Bytes for other ranks in a step, by group, those of the orthonormalization included."""
        sent: Counter[str] = Counter()
        for name, hop in self._hops:
            sent[name] += hop.bytes_sent
        largest = 4 * sum(map(len, self.batches))  # the largest entry of every P
        sent["tensor"] += ring_bytes(largest + 2 * self.gram_bytes, self._tensor_size)
        sent["replicas"] = ring_bytes(self._averaged.nbytes, self._replica_count)
        return sent


class _Rows:
    """Rows of the P of several matrices, one tile each, in one float32 tensor."""

    def __init__(self, tiles: Sequence[Tile], ranks: Sequence[int], buffers: Buffers) -> None:
        shapes = [torch.Size((tile.stop - tile.start, ranks[tile.matrix])) for tile in tiles]
        self.memory = buffers.empty(sum(shape.numel() for shape in shapes), torch.float32)
        self._views = views_in(self.memory, shapes)
        self._place = {t.matrix: (t.start, v) for t, v in zip(tiles, self._views, strict=True)}

    def view(self, tile: Tile) -> Tensor:
        """(rows, r) of a tile that lies within one of these."""
        first, values = self._place[tile.matrix]
        return values[tile.start - first : tile.stop - first]

    def views(self, tiles: Sequence[Tile]) -> list[Tensor]:
        """As `view`, of several tiles."""
        return [self.view(tile) for tile in tiles]

    def batches(self) -> Iterator[Tensor]:
        """All rows, (batch, rows, r), by shape, some at a time."""
        numbers = _NUMBERS.get(self.memory.device.type, _NUMBERS["cuda"])
        for shape, alike in groupby(self._views, key=lambda view: view.shape):
            views = list(alike)
            most = max(1, numbers // max(shape.numel(), 1))
            for first in range(0, len(views), most):
                count, start = len(views[first : first + most]), views[first].storage_offset()
                yield self.memory[start : start + count * shape.numel()].view(count, *shape)


class _HopExchange:
    """The memory of a `Hop` from `tiles` to `sums`, and its two directions."""

    def __init__(
        self,
        hop: Hop,
        me: int,
        tiles: _Rows,
        sums: _Rows,
        group: ProcessGroup | None,
        buffers: Buffers,
        wire: torch.dtype,
    ) -> None:
        self._group = group
        self._sums = sums.memory
        sent = {peer: tiles.views(each) for peer, each in enumerate(hop.sends) if peer != me}
        self._targets = [sums.views(each) for each in hop.receives]  # by peer
        self._send_sizes = [_numel(sent.get(peer, [])) for peer in range(len(hop.sends))]
        self._receive_sizes = [
            0 if peer == me else _numel(views) for peer, views in enumerate(self._targets)
        ]
        self._sent = buffers.empty(sum(self._send_sizes), wire)
        self._received = buffers.empty(sum(self._receive_sizes), wire)
        self.bytes_sent = self._sent.nbytes + self._received.nbytes  # there and back
        self._outgoing = [view for views in sent.values() for view in views]
        self._sent_views = views_in(self._sent, [view.shape for view in self._outgoing])
        self._arrivals = [
            views_in(part, [view.shape for view in views] if peer != me else [])
            for peer, (part, views) in enumerate(
                zip(self._received.split(self._receive_sizes), self._targets, strict=True)
            )
        ]
        self._arrivals[me] = tiles.views(hop.receives[me])

    def sum(self) -> Steps:
        """Sends all tiles and adds up what arrives, in the order of the peers."""
        copy_all(self._sent_views, self._outgoing)
        yield from all_to_all(
            self._received, self._sent, self._receive_sizes, self._send_sizes, self._group
        )
        self._sums.zero_()
        for targets, arrivals in zip(self._targets, self._arrivals, strict=True):
            if targets:
                torch._foreach_add_(targets, arrivals)

    def spread(self) -> Steps:
        """The way back: overwrites the tiles with the rows of the sums to which they belong."""
        for targets, arrivals in zip(self._targets, self._arrivals, strict=True):
            copy_all(arrivals, targets)
        yield from all_to_all(
            self._sent, self._received, self._send_sizes, self._receive_sizes, self._group
        )
        copy_all(self._outgoing, self._sent_views)


def _numel(views: Sequence[Tensor]) -> int:
    return sum(view.numel() for view in views)
