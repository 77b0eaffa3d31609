"""Who sends what to whom in a step: a pure function of shapes, sizes and a rank's coordinates.

Every rank plans for itself. The plans fit each other without a word being exchanged, and any rank
of any grid can be planned and tested in one process.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from megatron_dion.sharding.blocks import Rectangle
from megatron_dion.sharding.layout import Layout, Rank

_MOST_TO_ONE = 3
"""The most data-parallel ranks that send their parts of a P straight to its owner. With more ranks,
the owner receives less if they first sum slices of P."""


class Tile(NamedTuple):
    """Rows start:stop of the P of a matrix, (rows, r)."""

    matrix: int
    start: int
    stop: int


@dataclass(frozen=True)
class Hop:
    """One packed exchange within a group: tiles go to peers, and are summed there."""

    sends: tuple[tuple[Tile, ...], ...]  # by peer, what it gets from this rank
    receives: tuple[tuple[Tile, ...], ...]  # by peer, what this rank gets from it
    sums: tuple[Tile, ...]  # what the received tiles add up to, one for each matrix


@dataclass(frozen=True)
class Plan:
    """What one rank does in a step of some weights.

    P takes two hops to its owner: within the tensor-parallel group, each row goes to the rank that
    orthonormalizes it; over the data-parallel group, the sum of the first hop goes to the owner. If
    many ranks hold a matrix, each of them first sums a slice of the rows; else the owner alone
    would receive and add up the P of all of them. The orthonormalized P takes the same way back.
    """

    layout: Layout  # of all matrices
    rank: Rank
    placements: tuple[int, ...]  # the weights that are stepped, the same on every rank of the grid
    members: tuple[int, ...]  # their matrices
    # What this rank holds, with the index of the placement; first those rectangles whose rows other
    # tensor-parallel ranks have too.
    rectangles: tuple[tuple[int, Rectangle], ...]
    tiles: tuple[Tile, ...]  # rows of P to which this rank contributes, one tile for each matrix
    tensor_hop: Hop  # from `tiles` to the rows that this tensor-parallel rank orthonormalizes
    # From there to its slice of the rows, of every P that more than three data-parallel ranks hold.
    slice_hop: Hop | None  # None if no rank has such a P
    owner_hop: Hop  # from there to the rows of P that this rank orthonormalizes
    # By data-parallel peer, the rows of which both hold columns: matrix and number of the row.
    cut_rows: tuple[tuple[tuple[int, int], ...], ...]
    has_cut_rows: bool  # whether any rank holds columns of such a row
    has_partial_rows: bool  # whether R of any rectangle anywhere is a sum over a tensor group


def sets_of(layout: Layout, placements: Sequence[int], ranks: int) -> list[list[int]]:
    """Divides weights into sets whose steps take turns: one computes while another communicates.

    Weights of the same shape alternate, so that every rank has some of each set. There are
    `exchange_sets` of them; with a single rank nobody is waited for, and one set is enough. The
    result, indices of placements set by set, is a pure function of shapes and of the number of
    ranks that communicate.
    """

    def key(placement: int) -> tuple[int, int, int]:
        weight = layout.placements[placement].weight
        return weight.global_rows, weight.global_columns, placement

    count = 1 if ranks == 1 else layout.config.exchange_sets
    ordered = sorted(placements, key=key)
    sets = [sorted(ordered[turn::count]) for turn in range(count)]
    return [each for each in sets if each]


def make_plan(layout: Layout, rank: Rank, placements: Iterable[int] | None = None) -> Plan:
    """Plans a rank's step of some weights, the same on every rank; of all by default."""
    stepped = sorted(range(len(layout.placements)) if placements is None else placements)
    rectangles = [(p, rectangle) for p in stepped for rectangle in layout.rectangles(p, rank)]
    rectangles.sort(key=lambda item: not layout.shares_rows(item[0]))
    stages = _Stages(layout)
    shared = _shared_weights(layout, rank, stepped)
    tensor_group = layout.grid.tensor_group(rank.data_parallel)
    data_group = [Rank(rank.tensor_parallel, d) for d in range(layout.grid.data_parallel_size)]

    def hop(group: Sequence[Rank], tiles_of: _TilesOf, part_of: _PartOf) -> Hop:
        def parts(sender: Rank, receiver: Rank, peer: Rank) -> tuple[Tile, ...]:
            weights = shared[peer.data_parallel]
            tiles = _in_order(layout, [tile for p in weights for tile in tiles_of(p, sender)])
            every_part = (part_of(sender, tile, receiver) for tile in tiles)
            return tuple(part for part in every_part if part is not None)

        receives = tuple(parts(peer, rank, peer) for peer in group)
        return Hop(
            sends=tuple(parts(rank, peer, peer) for peer in group),
            receives=receives,
            sums=_in_order(layout, _hulls(tile for tiles in receives for tile in tiles)),
        )

    is_sliced = any(_is_sliced(layout, k) for p in stepped for k in layout.matrices_of[p])
    return Plan(
        layout=layout,
        rank=rank,
        placements=tuple(stepped),
        members=tuple(k for placement in stepped for k in layout.matrices_of[placement]),
        rectangles=tuple(rectangles),
        tiles=_in_order(layout, [tile for p in stepped for tile in stages.tiles(p, rank)]),
        tensor_hop=hop(tensor_group, stages.tiles, stages.to_row_owner),
        slice_hop=hop(data_group, stages.tensor_sums, stages.to_slices) if is_sliced else None,
        owner_hop=hop(data_group, stages.slice_sums, stages.to_owner),
        cut_rows=_cut_rows(layout, rank, rectangles),
        has_cut_rows=any(map(layout.cut_rows, stepped)),
        has_partial_rows=any(map(layout.shares_rows, stepped)),
    )


_TilesOf = Callable[[int, Rank], tuple[Tile, ...]]
"""The tiles that a rank has of the P of a weight before a hop."""
_PartOf = Callable[[Rank, Tile, Rank], Tile | None]
"""The part of a rank's tile that another rank gets in a hop."""


class _Stages:
    """The tiles that any rank has of the P of a weight before each hop, and where they go."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # The hops of a plan ask for the same things several times.
        self.tiles = cache(self._tiles)
        self.tensor_sums = cache(self._tensor_sums)
        self.slice_sums = cache(self._slice_sums)

    def _tiles(self, placement: int, rank: Rank) -> tuple[Tile, ...]:
        """For each matrix, the range of columns of which a rank holds elements."""
        return _hulls(
            Tile(each.matrix, each.column_start, each.column_stop)
            for each in self.layout.rectangles(placement, rank)
        )

    def _tensor_sums(self, placement: int, rank: Rank) -> tuple[Tile, ...]:
        """After the hop within the tensor-parallel group."""
        group = self.layout.grid.tensor_group(rank.data_parallel)
        tiles = (tile for peer in group for tile in self.tiles(placement, peer))
        parts = (self.to_row_owner(rank, tile, rank) for tile in tiles)
        return _hulls(part for part in parts if part is not None)

    def _slice_sums(self, placement: int, rank: Rank) -> tuple[Tile, ...]:
        """After the hop that sums a P in slices; a P that is not sliced is as it was."""
        sums = self.tensor_sums(placement, rank)
        tiles = [tile for tile in sums if not _is_sliced(self.layout, tile.matrix)]
        for k in self.layout.matrices_of[placement]:
            if _is_sliced(self.layout, k):
                rows = self.layout.owned_rows(k, rank.tensor_parallel)
                part = self.to_slices(rank, Tile(k, *rows), rank)
                tiles += [part] if part is not None else []
        return tuple(tiles)

    def to_row_owner(self, _: Rank, tile: Tile, receiver: Rank) -> Tile | None:
        """The rows of a tile that a rank of the tensor-parallel group orthonormalizes.

        If no row of a P is the receiver's, its part has no rows: the ranks of the group
        orthonormalize together, each with a part of every P.
        """
        return _part(tile, *self.layout.owned_rows(tile.matrix, receiver.tensor_parallel))

    def to_slices(self, rank: Rank, tile: Tile, receiver: Rank) -> Tile | None:
        """The rows that a holder of the matrix sums, an even part of its tensor-parallel rank's.

        A P that is not sliced stays where it is.
        """
        if not _is_sliced(self.layout, tile.matrix):
            return tile if receiver == rank else None
        holders = self.layout.holders[tile.matrix]  # ascending
        index, count = bisect_left(holders, receiver.data_parallel), len(holders)
        if index == count or holders[index] != receiver.data_parallel:
            return None
        first, last = self.layout.owned_rows(tile.matrix, receiver.tensor_parallel)
        rows = last - first
        return _part(tile, first + rows * index // count, first + rows * (index + 1) // count)

    def to_owner(self, _: Rank, tile: Tile, receiver: Rank) -> Tile | None:
        """The whole tile, if a rank is the owner of the P."""
        return tile if receiver.data_parallel == self.layout.owners[tile.matrix] else None


def _shared_weights(layout: Layout, rank: Rank, placements: Sequence[int]) -> list[list[int]]:
    """By data-parallel rank, the weights of which it and the given rank both hold some."""
    shared: list[list[int]] = [[] for _ in range(layout.grid.data_parallel_size)]
    for placement in placements:
        holders = layout.placements[placement].holders(layout.grid.data_parallel_size)
        for peer in holders if rank.data_parallel in holders else ():
            shared[peer].append(placement)
    return shared


def _is_sliced(layout: Layout, matrix: int) -> bool:
    return len(layout.holders[matrix]) > _MOST_TO_ONE


def _part(tile: Tile, first: int, last: int) -> Tile | None:
    """The rows of a tile within first:last, or None; a tile without rows if the range is empty."""
    start, stop = max(tile.start, first), min(tile.stop, last)
    if first == last:
        return Tile(tile.matrix, first, first)
    return Tile(tile.matrix, start, stop) if start < stop else None


def _hulls(tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """For each matrix, the smallest tile with the rows of all its tiles."""
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
) -> tuple[tuple[tuple[int, int], ...], ...]:
    rows: list[set[tuple[int, int]]] = [set() for _ in range(layout.grid.data_parallel_size)]
    for placement, rectangle in rectangles:
        for peer in layout.holders_of_cut_row(placement, rectangle, rank):
            if peer != rank.data_parallel:
                rows[peer].add((rectangle.matrix, rectangle.row_start))
    return tuple(tuple(sorted(each)) for each in rows)
