"""Who sends what to whom in a step: a pure function of shapes, sizes and a rank's coordinates.

Every rank plans for itself. The plans fit each other without a word being exchanged, and any rank
of any grid can be planned and tested in one process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    members = [k for placement in chosen for k in layout.matrices_of[placement]]
    rectangles = [(p, rectangle) for p in chosen for rectangle in layout.rectangles(p, rank)]
    rectangles.sort(key=lambda item: not layout.shares_rows(item[0]))
    return Plan(
        layout=layout,
        rank=rank,
        placements=tuple(chosen),
        members=tuple(members),
        rectangles=tuple(rectangles),
        tiles=_tiles(layout, rank, chosen),
        tensor_hop=_tensor_hop(layout, rank, chosen),
        slice_hop=_slice_hop(layout, rank, chosen),
        owner_hop=_owner_hop(layout, rank, chosen),
        cut_rows=_cut_rows(layout, rank, rectangles),
        has_cut_rows=any(map(layout.cut_rows, chosen)),
        has_partial_rows=any(map(layout.shares_rows, chosen)),
    )


def _tensor_hop(layout: Layout, rank: Rank, placements: Sequence[int]) -> Hop:
    group = layout.grid.tensor_group(rank.data_parallel)
    tiles_of_peers = [_tiles(layout, peer, placements) for peer in group]
    receives = [_owned_by(layout, rank.tensor_parallel, tiles) for tiles in tiles_of_peers]
    return Hop(
        sends=tuple(
            _owned_by(layout, peer.tensor_parallel, tiles_of_peers[rank.tensor_parallel])
            for peer in group
        ),
        receives=tuple(receives),
        sums=_hulls(layout, [tile for tiles in receives for tile in tiles]),
    )


def _slice_hop(layout: Layout, rank: Rank, placements: Sequence[int]) -> Hop | None:
    sliced = [p for p in placements if any(_is_sliced(layout, k) for k in layout.matrices_of[p])]
    if not sliced:
        return None
    sums = _slice_sums(layout, rank, placements)
    return _hop(layout, rank, placements, _tensor_sums, _slices, sliced, sums)


def _owner_hop(layout: Layout, rank: Rank, placements: Sequence[int]) -> Hop:
    def to_owner(layout: Layout, rank: Rank, tile: Tile) -> Iterator[tuple[int, Tile]]:
        yield layout.owners[tile.matrix], tile

    owned = [
        p
        for p in placements
        if any(layout.owners[k] == rank.data_parallel for k in layout.matrices_of[p])
    ]
    return _hop(layout, rank, placements, _slice_sums, to_owner, owned, None)


def _hop(
    layout: Layout,
    rank: Rank,
    placements: Sequence[int],
    tiles_of: Callable[[Layout, Rank, Sequence[int]], tuple[Tile, ...]],
    parts_of: Callable[[Layout, Rank, Tile], Iterator[tuple[int, Tile]]],
    received: Sequence[int],
    sums: tuple[Tile, ...] | None,
) -> Hop:
    """A hop over the data-parallel group.

    Args:
        layout: of all weights.
        rank: the rank.
        placements: the weights of the plan.
        tiles_of: what a rank has before the hop.
        parts_of: to which data-parallel rank which part of a rank's tile goes.
        received: those weights of which other ranks may send something.
        sums: what the hop sums; by default the hulls of what arrives.
    """
    d, size = rank.data_parallel, layout.grid.data_parallel_size
    sends: list[list[Tile]] = [[] for _ in range(size)]
    for tile in tiles_of(layout, rank, placements):
        for receiver, part in parts_of(layout, rank, tile):
            sends[receiver].append(part)
    of_peer: list[list[int]] = [[] for _ in range(size)]
    for placement in received:
        holders = layout.placements[placement].holders(size)
        for peer in holders if d in holders else ():
            if peer != d:
                of_peer[peer].append(placement)
    receives = [
        tuple(
            part
            for tile in tiles_of(layout, Rank(rank.tensor_parallel, peer), some)
            for receiver, part in parts_of(layout, Rank(rank.tensor_parallel, peer), tile)
            if receiver == d
        )
        for peer, some in enumerate(of_peer)
    ]
    receives[d] = tuple(sends[d])
    if sums is None:
        sums = _hulls(layout, [tile for tiles in receives for tile in tiles])
    return Hop(tuple(map(tuple, sends)), tuple(receives), sums)


def _is_sliced(layout: Layout, matrix: int) -> bool:
    return len(layout.holders[matrix]) > _MOST_TO_ONE


def _slices(layout: Layout, rank: Rank, tile: Tile) -> Iterator[tuple[int, Tile]]:
    """Which holder sums which rows of a tile; if the P is not sliced, the tile stays."""
    matrix, start, stop = tile
    if not _is_sliced(layout, matrix):
        yield rank.data_parallel, tile
        return
    for index, holder in enumerate(layout.holders[matrix]):
        first, last = _slice(layout, matrix, rank.tensor_parallel, index)
        part = Tile(matrix, max(start, first), min(stop, last))
        if part.start < part.stop:
            yield holder, part


def _slice(layout: Layout, matrix: int, tensor_parallel_rank: int, index: int) -> tuple[int, int]:
    """The rows that a matrix's holder of some index sums: an even share of the rank's."""
    first, last = layout.owned_rows(matrix, tensor_parallel_rank)
    rows, count = last - first, len(layout.holders[matrix])
    return first + rows * index // count, first + rows * (index + 1) // count


def _slice_sums(layout: Layout, rank: Rank, placements: Sequence[int]) -> tuple[Tile, ...]:
    """What a rank has before the hop to the owner."""
    tiles = [
        tile
        for tile in _tensor_sums(layout, rank, placements)
        if not _is_sliced(layout, tile.matrix)
    ]
    for placement in placements:
        for k in layout.matrices_of[placement]:
            if _is_sliced(layout, k) and rank.data_parallel in layout.holders[k]:
                index = layout.holders[k].index(rank.data_parallel)
                first, last = _slice(layout, k, rank.tensor_parallel, index)
                owned_rows = layout.owned_rows(k, rank.tensor_parallel)
                if first < last or owned_rows[0] == owned_rows[1]:
                    tiles.append(Tile(k, first, last))
    return _hulls(layout, tiles)


def _tensor_sums(layout: Layout, rank: Rank, placements: Sequence[int]) -> tuple[Tile, ...]:
    if not placements:
        return ()
    tiles = [
        tile
        for peer in layout.grid.tensor_group(rank.data_parallel)
        for tile in _tiles(layout, peer, placements)
    ]
    return _hulls(layout, _owned_by(layout, rank.tensor_parallel, tiles))


def _tiles(layout: Layout, rank: Rank, placements: Sequence[int]) -> tuple[Tile, ...]:
    """The hull of the columns of each matrix of which a rank holds any."""
    return _hulls(
        layout,
        [
            Tile(rectangle.matrix, rectangle.column_start, rectangle.column_stop)
            for placement in placements
            for rectangle in layout.rectangles(placement, rank)
        ],
    )


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


def _hulls(layout: Layout, tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """One tile for each matrix: in the same order on every rank, equal shapes side by side."""
    hulls: dict[int, Tile] = {}
    for tile in tiles:
        hull = hulls.get(tile.matrix, tile)
        start, stop = min(hull.start, tile.start), max(hull.stop, tile.stop)
        hulls[tile.matrix] = Tile(tile.matrix, start, stop)
    shapes = [(matrix.columns, matrix.rank) for matrix in layout.matrices]
    return tuple(sorted(hulls.values(), key=lambda tile: (shapes[tile.matrix], tile.matrix)))


def _cut_rows(
    layout: Layout, rank: Rank, rectangles: Iterable[tuple[int, Rectangle]]
) -> tuple[tuple[CutRow, ...], ...]:
    rows: list[set[CutRow]] = [set() for _ in range(layout.grid.data_parallel_size)]
    for placement, rectangle in rectangles:
        for peer in layout.holders_of_cut_row(placement, rectangle, rank):
            if peer != rank.data_parallel:
                rows[peer].add(CutRow(rectangle.matrix, rectangle.row_start))
    return tuple(tuple(sorted(each)) for each in rows)
