"""Sums over a grid, in two packed exchanges: who sends what to whom, and who adds it up."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from megatron_dion.algorithm import Matrix
from megatron_dion.sharding.balance import Charge, cut
from megatron_dion.sharding.layout import Layout, Rank


@dataclass(frozen=True)
class Tile:
    """Rows start:stop of something (rows, r) that is summed for a matrix, such as its P.

    Attributes:
        matrix: index of the matrix.
        start: first row.
        stop: one past the last row.
        charge: index of the charge whose rows these are.
    """

    matrix: int
    start: int
    stop: int
    charge: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """The same for all tiles of a charge."""
        return self.matrix, self.charge


@dataclass(frozen=True)
class Hop:
    """One packed exchange within a group: tiles go to the ranks in charge and are summed there.

    Attributes:
        sends: for each peer the tiles that it gets from this rank.
        receives: for each peer the tiles that this rank gets from it.
        sums: what the received tiles add up to.
        is_silent: whether no rank of the whole grid has anything for another, so that there is
            nothing to call; the same on all ranks.
    """

    sends: tuple[tuple[Tile, ...], ...]
    receives: tuple[tuple[Tile, ...], ...]
    sums: tuple[Tile, ...]
    is_silent: bool


@dataclass(frozen=True)
class Reduction:
    """Sums over a grid, first within tensor-parallel groups, then over data-parallel ones.

    So what travels between data-parallel ranks is already summed. The second hop sends from the
    memory into which the first one sums. Both can be taken backwards, to spread the sums.
    """

    tensor_hop: Hop
    data_hop: Hop


@dataclass(frozen=True)
class Sum:
    """Something (rows, r) that is summed for one matrix.

    Attributes:
        rows_of: for each rank that contributes the hull of its rows.
        charges: who sums which rows.
    """

    rows_of: Mapping[Rank, tuple[int, int]]
    charges: tuple[Charge, ...]

    @cached_property
    def by_data_rank(self) -> dict[int, dict[Rank, tuple[int, int]]]:
        found: dict[int, dict[Rank, tuple[int, int]]] = {}
        for rank, rows in self.rows_of.items():
            found.setdefault(rank.data_parallel, {})[rank] = rows
        return found

    def stays_with(self, coordinate: Callable[[Rank], int]) -> bool:
        """Whether ranks contribute to charges of their own data- or tensor-parallel rank only."""
        return all(
            coordinate(rank) == coordinate(charge.rank)
            or stop <= charge.start
            or charge.stop <= start
            for rank, (start, stop) in self.rows_of.items()
            for charge in self.charges
        )

    def tile(self, rank: Rank, index: int) -> Tile | None:
        """What a rank contributes to a charge."""
        return self._cut([self.rows_of[rank]], index) if rank in self.rows_of else None

    def summed_tile(self, data_rank: int, index: int) -> Tile | None:
        """What a whole tensor-parallel group contributes to a charge."""
        return self._cut(self.by_data_rank.get(data_rank, {}).values(), index)

    def _cut(self, rows: Iterable[tuple[int, int]], index: int) -> Tile | None:
        charge = self.charges[index]
        clipped = [(max(a, charge.start), min(b, charge.stop)) for a, b in rows]
        inside = [(a, b) for a, b in clipped if a < b]
        if not inside:
            return None
        start, stop = min(a for a, _ in inside), max(b for _, b in inside)
        return Tile(charge.matrix, start, stop, index)


def sum_for_all(matrix: int, rows: int, ranks: Sequence[Rank]) -> Sum:
    """All of the ranks bring all rows, and each is in charge of as many."""
    return Sum(dict.fromkeys(ranks, (0, rows)), cut(matrix, rows, ranks[:rows]))


def reduction(layout: Layout, rank: Rank, sums: Mapping[int, Sum]) -> Reduction:
    """A rank's two hops for the sums of some matrices."""
    grid, d = layout.grid, rank.data_parallel
    charges = _in_canonical_order(layout.matrices, sums)
    near = [  # what this rank's tensor-parallel group brings
        (charge, tile)
        for charge, index in charges
        if d in sums[charge.matrix].by_data_rank
        and (tile := sums[charge.matrix].summed_tile(d, index)) is not None
    ]
    tensor_sums = [
        (charge, tile)
        for charge, tile in near
        if charge.rank.tensor_parallel == rank.tensor_parallel
    ]
    mine = [(charge, index) for charge, index in charges if charge.rank == rank]
    tensor_hop = Hop(
        sends=_split_by(
            (
                (charge.rank.tensor_parallel, tile)
                for charge, summed in near
                if (tile := sums[charge.matrix].tile(rank, summed.charge)) is not None
            ),
            grid.tensor_parallel_size,
        ),
        receives=tuple(
            tuple(
                tile
                for charge, summed in tensor_sums
                if (tile := sums[charge.matrix].tile(peer, summed.charge)) is not None
            )
            for peer in grid.tensor_group(rank)
        ),
        sums=tuple(tile for _, tile in tensor_sums),
        is_silent=all(s.stays_with(attrgetter("tensor_parallel")) for s in sums.values()),
    )
    data_hop = Hop(
        sends=_split_by(
            ((charge.rank.data_parallel, tile) for charge, tile in tensor_sums),
            grid.data_parallel_size,
        ),
        receives=_split_by(
            (
                (peer, tile)
                for charge, index in mine
                for peer in sums[charge.matrix].by_data_rank
                if (tile := sums[charge.matrix].summed_tile(peer, index)) is not None
            ),
            grid.data_parallel_size,
        ),
        sums=tuple(Tile(charge.matrix, charge.start, charge.stop, i) for charge, i in mine),
        is_silent=all(s.stays_with(attrgetter("data_parallel")) for s in sums.values()),
    )
    return Reduction(tensor_hop, data_hop)


def _in_canonical_order(
    matrices: Sequence[Matrix], sums: Mapping[int, Sum]
) -> list[tuple[Charge, int]]:
    """All charges: those of a data-parallel rank together, among them equal shapes side by side.

    Sender and receiver pack their tiles in this order.
    """
    charges = [
        (charge, index) for sum_ in sums.values() for index, charge in enumerate(sum_.charges)
    ]
    heights = {k: sum_.charges[-1].stop for k, sum_ in sums.items()}
    return sorted(
        charges,
        key=lambda item: (
            item[0].rank.data_parallel,
            heights[item[0].matrix],
            item[0].stop - item[0].start,
            matrices[item[0].matrix].rank,
            item[0].matrix,
            item[1],
        ),
    )


def _split_by(items: Iterable[tuple[int, Tile]], size: int) -> tuple[tuple[Tile, ...], ...]:
    found: list[list[Tile]] = [[] for _ in range(size)]
    for index, tile in items:
        found[index].append(tile)
    return tuple(tuple(tiles) for tiles in found)
