"""Who sends what to whom in a step: a pure function of shapes, sizes and a rank's coordinates.

Every rank plans for itself. The plans fit each other without a word being exchanged, and any rank
of any grid can be planned and tested in one process.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from megatron_dion.sharding.blocks import Rectangle
from megatron_dion.sharding.layout import Layout, Rank

_MOST_TO_ONE = 3
"""Data-parallel ranks that send their parts of a P straight to its owner. With three, slices send
the owner as much; with more, less."""


class Tile(NamedTuple):
    """Rows start:stop of the P of a matrix, (rows, r)."""

    matrix: int
    start: int
    stop: int


@dataclass(frozen=True)
class Hop:
    """One packed exchange within a group: tiles go to peers, and are summed there.

    Attributes:
        sends: for each peer of the group the tiles that it gets from this rank.
        receives: for each peer the tiles that this rank gets from it.
        sums: what the received tiles add up to, one for each matrix.
    """

    sends: tuple[tuple[Tile, ...], ...]
    receives: tuple[tuple[Tile, ...], ...]
    sums: tuple[Tile, ...]


class CutRow(NamedTuple):
    """A row of a matrix whose columns lie on several data-parallel ranks."""

    matrix: int
    row: int


@dataclass(frozen=True)
class Plan:
    """What one rank does in a step of some weights.

    P takes two hops to its owner: within the tensor-parallel group, to the rank whose rows of P
    these are; from there over the data-parallel group, to the owner. So what travels between
    data-parallel ranks is already summed. If many ranks hold a matrix, each of them first sums a
    slice of the rows; else the owner alone would receive and add up the P of all of them. The
    orthonormalized P takes the same way back.

    Attributes:
        layout: of all matrices.
        rank: the rank.
        placements: the weights that are stepped, the same on every rank of the grid.
        members: their matrices.
        rectangles: what this rank holds, (index of the placement, rectangle) each; first those
            whose rows other tensor-parallel ranks have too.
        tiles: the rows of P to which this rank contributes, one tile for each matrix.
        tensor_hop: from `tiles` to the rank's share of their rows.
        slice_hop: of every P that more than three data-parallel ranks hold, from there to the
            rank's slice of the rows; None if no rank has such a P.
        owner_hop: from there to the rows of P that this rank orthonormalizes.
        cut_rows: for each data-parallel peer the rows of which both hold columns.
        has_cut_rows: whether there are any on any rank.
        has_partial_rows: whether R of any rectangle on any rank is a sum over the tensor-parallel
            group.
    """

    layout: Layout
    rank: Rank
    placements: tuple[int, ...]
    members: tuple[int, ...]
    rectangles: tuple[tuple[int, Rectangle], ...]
    tiles: tuple[Tile, ...]
    tensor_hop: Hop
    slice_hop: Hop | None
    owner_hop: Hop
    cut_rows: tuple[tuple[CutRow, ...], ...]
    has_cut_rows: bool
    has_partial_rows: bool


def make_plan(layout: Layout, rank: Rank, placements: Iterable[int] | None = None) -> Plan:
    """Plans a rank's step of some weights.

    Args:
        layout: of all weights.
        rank: the rank.
        placements: indices of the weights, the same on every rank; all by default.
    """
    chosen = sorted(range(len(layout.placements)) if placements is None else placements)
    rectangles = [(p, rectangle) for p in chosen for rectangle in layout.rectangles(p, rank)]
    rectangles.sort(key=lambda item: not layout.shares_rows(item[0]))
    stages = _Stages(layout)
    return Plan(
        layout=layout,
        rank=rank,
        placements=tuple(chosen),
        members=tuple(k for placement in chosen for k in layout.matrices_of[placement]),
        rectangles=tuple(rectangles),
        tiles=_in_order(layout, [tile for p in chosen for tile in stages.tiles(p, rank)]),
        tensor_hop=_tensor_hop(stages, rank, chosen),
        slice_hop=_slice_hop(stages, rank, chosen),
        owner_hop=_data_hop(stages, rank, chosen, stages.slice_sums, stages.to_owner),
        cut_rows=_cut_rows(layout, rank, rectangles),
        has_cut_rows=any(map(layout.cut_rows, chosen)),
        has_partial_rows=any(map(layout.shares_rows, chosen)),
    )


class _Stages:
    """What any rank has of the P of a weight before each hop, and where it goes."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # The hops of a plan ask for the same things several times.
        self.tiles = cache(self._tiles)
        self.tensor_sums = cache(self._tensor_sums)
        self.slice_sums = cache(self._slice_sums)

    def _tiles(self, placement: int, rank: Rank) -> tuple[Tile, ...]:
        """The hull of the columns of each matrix of which a rank holds any."""
        return _hulls(
            Tile(each.matrix, each.column_start, each.column_stop)
            for each in self.layout.rectangles(placement, rank)
        )

    def _tensor_sums(self, placement: int, rank: Rank) -> tuple[Tile, ...]:
        """After the hop within the tensor-parallel group: a rank's share of the rows."""
        group = self.layout.grid.tensor_group(rank.data_parallel)
        tiles = [tile for peer in group for tile in self.tiles(placement, peer)]
        return _hulls(_owned_by(self.layout, rank.tensor_parallel, tiles))

    def _slice_sums(self, placement: int, rank: Rank) -> tuple[Tile, ...]:
        """After the hop that sums a P in slices; a P that is not sliced is as it was."""
        layout = self.layout
        sums = self.tensor_sums(placement, rank)
        tiles = [tile for tile in sums if not _is_sliced(layout, tile.matrix)]
        for k in layout.matrices_of[placement]:
            slice_ = _slice(layout, k, rank) if _is_sliced(layout, k) else None
            owned_rows = layout.owned_rows(k, rank.tensor_parallel)
            if slice_ and (slice_.start < slice_.stop or owned_rows[0] == owned_rows[1]):
                tiles.append(slice_)
        return tuple(tiles)

    def to_slices(self, rank: Rank, tile: Tile, receiver: int) -> Tile | None:
        """What of a rank's tile a data-parallel rank sums; a P that is not sliced stays."""
        if not _is_sliced(self.layout, tile.matrix):
            return tile if receiver == rank.data_parallel else None
        slice_ = _slice(self.layout, tile.matrix, Rank(rank.tensor_parallel, receiver))
        if slice_ is None:
            return None
        start, stop = max(tile.start, slice_.start), min(tile.stop, slice_.stop)
        return Tile(tile.matrix, start, stop) if start < stop else None

    def to_owner(self, rank: Rank, tile: Tile, receiver: int) -> Tile | None:
        """The tile, if a data-parallel rank is its owner."""
        return tile if receiver == self.layout.owners[tile.matrix] else None


def _tensor_hop(stages: _Stages, rank: Rank, placements: Sequence[int]) -> Hop:
    layout = stages.layout
    group = layout.grid.tensor_group(rank.data_parallel)
    tiles = [
        _in_order(layout, [tile for p in placements for tile in stages.tiles(p, peer)])
        for peer in group
    ]
    mine = tiles[rank.tensor_parallel]
    sums = [tile for p in placements for tile in stages.tensor_sums(p, rank)]
    return Hop(
        sends=tuple(_owned_by(layout, peer.tensor_parallel, mine) for peer in group),
        receives=tuple(_owned_by(layout, rank.tensor_parallel, each) for each in tiles),
        sums=_in_order(layout, sums),
    )


def _slice_hop(stages: _Stages, rank: Rank, placements: Sequence[int]) -> Hop | None:
    layout = stages.layout
    if not any(_is_sliced(layout, k) for p in placements for k in layout.matrices_of[p]):
        return None
    hop = _data_hop(stages, rank, placements, stages.tensor_sums, stages.to_slices)
    sums = [tile for p in placements for tile in stages.slice_sums(p, rank)]
    return replace(hop, sums=_in_order(layout, sums))


def _data_hop(
    stages: _Stages,
    rank: Rank,
    placements: Sequence[int],
    tiles_of: Callable[[int, Rank], tuple[Tile, ...]],
    part_of: Callable[[Rank, Tile, int], Tile | None],
) -> Hop:
    """A hop over the data-parallel group.

    Args:
        stages: of the layout.
        rank: the rank.
        placements: the weights of the plan.
        tiles_of: what a rank has of a weight before the hop.
        part_of: what of a rank's tile a data-parallel rank gets.
    """
    layout, d = stages.layout, rank.data_parallel
    size = layout.grid.data_parallel_size
    shared: list[list[int]] = [[] for _ in range(size)]  # by peer, weights of which both hold some
    for placement in placements:
        holders = layout.placements[placement].holders(size)
        for peer in holders if d in holders else ():
            shared[peer].append(placement)

    def parts(sender: int, receiver: int, weights: Sequence[int]) -> tuple[Tile, ...]:
        source = Rank(rank.tensor_parallel, sender)
        tiles = _in_order(layout, [tile for p in weights for tile in tiles_of(p, source)])
        every_part = (part_of(source, tile, receiver) for tile in tiles)
        return tuple(part for part in every_part if part is not None)

    sends = tuple(parts(d, peer, weights) for peer, weights in enumerate(shared))
    receives = tuple(parts(peer, d, weights) for peer, weights in enumerate(shared))
    sums = _in_order(layout, _hulls(tile for tiles in receives for tile in tiles))
    return Hop(sends, receives, sums)


def _is_sliced(layout: Layout, matrix: int) -> bool:
    return len(layout.holders[matrix]) > _MOST_TO_ONE


def _slice(layout: Layout, matrix: int, rank: Rank) -> Tile | None:
    """The rows that a holder of a matrix sums: an even share of its tensor-parallel rank's."""
    holders = layout.holders[matrix]  # ascending
    index = bisect_left(holders, rank.data_parallel)
    if index == len(holders) or holders[index] != rank.data_parallel:
        return None
    first, last = layout.owned_rows(matrix, rank.tensor_parallel)
    rows, count = last - first, len(holders)
    return Tile(matrix, first + rows * index // count, first + rows * (index + 1) // count)


def _owned_by(layout: Layout, tensor_parallel_rank: int, tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """The parts of tiles of which a rank of a tensor-parallel group is in charge.

    If no row of a P is the rank's, its tile has no rows: the ranks of the group orthonormalize
    together, each with a tile of every P.
    """
    parts = []
    for matrix, start, stop in tiles:
        first, last = layout.owned_rows(matrix, tensor_parallel_rank)
        part = Tile(matrix, max(start, first), min(stop, last))
        if part.start < part.stop:
            parts.append(part)
        elif first == last:
            parts.append(Tile(matrix, first, first))
    return tuple(parts)


def _hulls(tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """One tile for each matrix."""
    hulls: dict[int, Tile] = {}
    for tile in tiles:
        hull = hulls.get(tile.matrix, tile)
        start, stop = min(hull.start, tile.start), max(hull.stop, tile.stop)
        hulls[tile.matrix] = Tile(tile.matrix, start, stop)
    return tuple(hulls.values())


def _in_order(layout: Layout, tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """The order that all ranks share, with equal shapes side by side."""

    def key(tile: Tile) -> tuple[int, int, int]:
        matrix = layout.matrices[tile.matrix]
        return matrix.columns, matrix.rank, tile.matrix

    return tuple(sorted(tiles, key=key))


def _cut_rows(
    layout: Layout, rank: Rank, rectangles: Iterable[tuple[int, Rectangle]]
) -> tuple[tuple[CutRow, ...], ...]:
    rows: list[set[CutRow]] = [set() for _ in range(layout.grid.data_parallel_size)]
    for placement, rectangle in rectangles:
        for peer in layout.holders_of_cut_row(placement, rectangle, rank):
            if peer != rank.data_parallel:
                rows[peer].add(CutRow(rectangle.matrix, rectangle.row_start))
    return tuple(tuple(sorted(each)) for each in rows)
