"""Carries out a plan with torch.distributed: the buffers, and the collectives between them.

A step takes at most eight collectives however many matrices there are: two all_to_alls each way
for P (tensor parallel, data parallel), an all_reduce and an all_to_all for R, and two all_reduces
for the column norms.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm import Matrix
from megatron_dion.sharding.plan import Hop, Plan, SharedRow, Tile


class ShardedExchange:
    """The exchange of one rank of a grid (`megatron_dion.algorithm.Exchange`).

    Args:
        plan: of this rank.
        projections: (matrix, row_start, (rows, r)) for each block: views of the memory of R.
        tensor_sum: the part of R, 1-D, to be summed over the tensor-parallel group.
        tensor_group: tensor-parallel group, None for a single rank.
        data_group: data-parallel group, None for a single rank.
        device: where the matrices are.
    """

    def __init__(
        self,
        plan: Plan,
        projections: Sequence[tuple[int, int, Tensor]],
        tensor_sum: Tensor,
        tensor_group: ProcessGroup | None,
        data_group: ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._groups = [group for group in (tensor_group, data_group) if _size(group) > 1]
        self._tensor_group = tensor_group
        self._tensor_sum = tensor_sum
        self._tensor_hop = _HopBuffers(
            plan.tensor_hop, plan.matrices, tensor_group, device, source=None
        )
        self._data_hop = _HopBuffers(
            plan.data_hop, plan.matrices, data_group, device, source=self._tensor_hop.sums
        )
        self._rows = _SharedRowBuffers(plan, projections, data_group, device)
        self._norms_numel = sum(matrix.rank for matrix in plan.matrices)
        self.left = self._tensor_hop.tiles

    def left_tiles(self) -> dict[int, tuple[Tile, Tensor]]:
        """For each matrix held here its tile, and the tile's (rows, r) view of `left`."""
        return {
            tile.matrix: (tile, view)
            for tile, view in zip(
                self._tensor_hop.hop.tiles, self._tensor_hop.tile_views, strict=True
            )
        }

    def sum_left(self) -> Sequence[tuple[int, Tensor]]:
        self._tensor_hop.sum()
        self._data_hop.sum()
        hop = self._data_hop
        return [(tile.matrix, view) for tile, view in zip(hop.hop.sums, hop.sum_views, strict=True)]

    def spread_left(self) -> None:
        self._data_hop.spread()
        self._tensor_hop.spread()

    def sum_rows(self) -> None:
        if _size(self._tensor_group) > 1:
            dist.all_reduce(self._tensor_sum, group=self._tensor_group)
        self._rows.sum()

    def sum_norms(self, squares: Tensor) -> None:
        for group in self._groups:
            dist.all_reduce(squares, group=group)

    @property
    def bytes_per_step(self) -> int:
        """Bytes that this rank hands to the collectives of a step for other ranks.

        An all_reduce of N bytes counts as 2 N (k - 1) / k in a group of k, what a ring sends.
        """
        sent = self._tensor_hop.bytes_per_step + self._data_hop.bytes_per_step
        sent += self._rows.bytes_per_step
        sent += _ring_bytes(self._tensor_sum.numel() * 4, self._tensor_group)
        return sent + sum(_ring_bytes(self._norms_numel * 8, group) for group in self._groups)


class _HopBuffers:
    """The memory of a `Hop` and its two directions. With a single rank, tiles and sums are one."""

    def __init__(
        self,
        hop: Hop,
        matrices: Sequence[Matrix],
        group: ProcessGroup | None,
        device: torch.device,
        source: Tensor | None,
    ) -> None:
        self.hop = hop
        self._group = group
        self._send_sizes = [_numel(tiles, matrices) for tiles in hop.sends]
        self._receive_sizes = [_numel(tiles, matrices) for tiles in hop.receives]
        self.tiles = _zeros(sum(self._send_sizes), device) if source is None else source
        self.tile_views = _tile_views(self.tiles, hop.tiles, matrices)
        if _size(group) == 1:
            self.sums, self.sum_views = self.tiles, self.tile_views
            return
        self.sums = _zeros(_numel(hop.sums, matrices), device)
        self.sum_views = _tile_views(self.sums, hop.sums, matrices)
        self._received = _zeros(sum(self._receive_sizes), device)
        self._arrivals = self._match_arrivals(matrices)

    def _match_arrivals(
        self, matrices: Sequence[Matrix]
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        """For each peer its received tiles, and the rows of the sums to which they belong."""
        place = {
            tile.matrix: (tile.start, view)
            for tile, view in zip(self.hop.sums, self.sum_views, strict=True)
        }
        arrivals = []
        buffers = self._received.split(self._receive_sizes)
        for buffer, tiles in zip(buffers, self.hop.receives, strict=True):
            targets = []
            for tile in tiles:
                start, view = place[tile.matrix]
                targets.append(view[tile.start - start : tile.stop - start])
            arrivals.append((_tile_views(buffer, tiles, matrices), targets))
        return arrivals

    def sum(self) -> None:
        """Sends all tiles and adds up what arrives, in the order of the peers."""
        if _size(self._group) == 1:
            return
        dist.all_to_all_single(
            self._received, self.tiles, self._receive_sizes, self._send_sizes, group=self._group
        )
        self.sums.zero_()
        for arrived, targets in self._arrivals:
            if arrived:
                torch._foreach_add_(targets, arrived)

    def spread(self) -> None:
        """The way back: overwrites the tiles with the rows of the sums that they contribute to."""
        if _size(self._group) == 1:
            return
        for arrived, targets in self._arrivals:
            if arrived:
                torch._foreach_copy_(arrived, targets)
        dist.all_to_all_single(
            self.tiles, self._received, self._send_sizes, self._receive_sizes, group=self._group
        )

    @property
    def bytes_per_step(self) -> int:
        if _size(self._group) == 1:
            return 0
        me = dist.get_rank(self._group)
        there = sum(self._send_sizes) - self._send_sizes[me]
        back = sum(self._receive_sizes) - self._receive_sizes[me]
        return 4 * (there + back)


class _SharedRowBuffers:
    """Sums of the rows of R that data-parallel ranks share; every holder adds up all parts.

    All add in the order of the ranks, so their copies of a row are equal to the last bit.
    """

    def __init__(
        self,
        plan: Plan,
        projections: Sequence[tuple[int, int, Tensor]],
        group: ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._group = group
        if _size(group) == 1:
            return
        starts = {(matrix, row): view for matrix, row, view in projections}

        def row_views(rows: Sequence[SharedRow]) -> list[Tensor]:
            return [starts[shared.matrix, shared.row][0] for shared in rows]  # each (r,)

        mine = sorted({(row.matrix, row.row) for peer in plan.shared_rows for row in peer})
        self._mine = row_views([SharedRow(*key) for key in mine])
        self._kept = [torch.empty_like(view) for view in self._mine]
        self._parts = [row_views(rows) for rows in plan.shared_rows]
        self._sizes = [sum(view.numel() for view in views) for views in self._parts]
        self._sent = _zeros(sum(self._sizes), device)
        self._received = _zeros(sum(self._sizes), device)
        self._sent_views = _like_views(self._sent, [v for views in self._parts for v in views])
        self._received_views = [
            _like_views(buffer, views)
            for buffer, views in zip(self._received.split(self._sizes), self._parts, strict=True)
        ]

    def sum(self) -> None:
        if _size(self._group) == 1:
            return
        parts = [view for views in self._parts for view in views]
        if parts:
            torch._foreach_copy_(self._sent_views, parts)
        dist.all_to_all_single(
            self._received, self._sent, self._sizes, self._sizes, group=self._group
        )
        if not parts:
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

    @property
    def bytes_per_step(self) -> int:
        return 0 if _size(self._group) == 1 else 4 * sum(self._sizes)


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _zeros(numel: int, device: torch.device) -> Tensor:
    return torch.zeros(numel, dtype=torch.float32, device=device)


def _numel(tiles: Sequence[Tile], matrices: Sequence[Matrix]) -> int:
    return sum((tile.stop - tile.start) * matrices[tile.matrix].rank for tile in tiles)


def _tile_views(buffer: Tensor, tiles: Sequence[Tile], matrices: Sequence[Matrix]) -> list[Tensor]:
    """Views (rows, r) of tiles that lie one behind the other in a buffer."""
    shapes = [(tile.stop - tile.start, matrices[tile.matrix].rank) for tile in tiles]
    sizes = [rows * rank for rows, rank in shapes]
    parts = buffer[: sum(sizes)].split(sizes) if sizes else ()
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _like_views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of consecutive parts of a buffer with the shapes of the tensors."""
    parts = buffer.split([tensor.numel() for tensor in tensors]) if tensors else ()
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _ring_bytes(numel_bytes: int, group: ProcessGroup | None) -> int:
    size = _size(group)
    return 2 * numel_bytes * (size - 1) // size
