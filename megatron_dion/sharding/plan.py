"""Who holds, sums and decides what: a pure function of shapes and sizes.

Every rank of a grid of tensor-parallel x data-parallel ranks computes its own plan from the same
list of placements, so the plans of all ranks fit each other without a word being exchanged, and
any rank of any grid can be planned and tested in one process.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_dion.algorithm import DionConfig, Matrix
from megatron_dion.algorithm.orthonormalize import summed_rows
from megatron_dion.sharding.balance import Charge, Charges, divide
from megatron_dion.sharding.layout import Grid, Held, Layout, Placement, Rank


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


@dataclass(frozen=True)
class Hop:
    """One packed exchange within a group: tiles go to the ranks in charge and are summed there.

    Attributes:
        sends: for each peer the tiles that it gets from this rank.
        receives: for each peer the tiles that this rank gets from it.
        sums: what the received tiles add up to.
    """

    sends: tuple[tuple[Tile, ...], ...]
    receives: tuple[tuple[Tile, ...], ...]
    sums: tuple[Tile, ...]

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles of this rank, in the order in which they are sent."""
        return tuple(tile for tiles in self.sends for tile in tiles)


@dataclass(frozen=True)
class Reduction:
    """Sums over a grid, first within tensor-parallel groups, then over data-parallel ones.

    So what travels between data-parallel ranks is already summed. The second hop sends from the
    memory into which the first one sums. Both can be taken backwards, to spread the sums.
    """

    tensor_hop: Hop
    data_hop: Hop


@dataclass(frozen=True)
class SharedRow:
    """A row of a matrix whose columns lie on several data-parallel ranks."""

    matrix: int
    row: int


@dataclass(frozen=True)
class Plan:
    """What one rank does in a step of a set of matrices.

    Attributes:
        rank: the rank.
        layout: of all matrices.
        members: the matrices that are stepped, the same on every rank of the grid.
        held: this rank's blocks; first those whose rows other tensor-parallel ranks have too.
        charges: who is in charge of their P, the same on every rank.
        left: sums P.
        part_sums: sums of what orthonormalizing a divided P needs, one after the other; empty if no
            P of the set is divided.
        grams: sums R^T R for the right factor `orth`, otherwise None.
        shared_rows: for each data-parallel peer the rows of which both hold columns.
    """

    rank: Rank
    layout: Layout
    members: tuple[int, ...]
    held: tuple[Held, ...]
    charges: Mapping[int, tuple[Charge, ...]]
    left: Reduction
    part_sums: tuple[Reduction, ...]
    grams: Reduction | None
    shared_rows: tuple[tuple[SharedRow, ...], ...]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.layout.matrices

    def has_partial_rows(self, held: Held) -> bool:
        """Whether R of a block is a sum over tensor-parallel ranks."""
        return self.layout.shares_rows(held.placement)

    def gathering(self, matrices: Iterable[int]) -> Reduction:
        """Brings the sections of some P together on one rank each."""
        return _reduction(
            self.layout,
            self.rank,
            {
                k: _Sum(
                    {charge.rank: (charge.start, charge.stop) for charge in self.charges[k]},
                    (Charge(k, 0, self.matrices[k].columns, self.charges[k][0].rank),),
                )
                for k in matrices
            },
        )


class Planner:
    """Plans any rank of a grid.

    Args:
        placements: the weights, the same list on every rank of the grid.
        grid: the ranks.
        config: hyperparameters.
        sets: indices of placements whose matrices are stepped together, one plan for each set; all
            in one set by default.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        grid: Grid,
        config: DionConfig,
        sets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.layout = Layout(placements, grid, config)
        self.sets = [tuple(range(len(placements)))] if sets is None else [tuple(s) for s in sets]
        self.load: dict[Rank, float] = {}
        self.charges: Charges = {}
        for index in range(len(self.sets)):
            self.charges |= divide(self.layout, self.members(index), self.load)

    def members(self, index: int) -> tuple[int, ...]:
        """The matrices of a set."""
        layout, chosen = self.layout, set(self.sets[index])
        firsts = [*layout.first_matrix, len(layout.matrices)]
        return tuple(
            matrix
            for placement in range(len(layout.placements))
            if placement in chosen
            for matrix in range(firsts[placement], firsts[placement + 1])
        )

    def plans(self, rank: Rank) -> list[Plan]:
        """A rank's plan for each set."""
        return [self._plan(rank, index) for index in range(len(self.sets))]

    def _plan(self, rank: Rank, index: int) -> Plan:
        layout, members = self.layout, self.members(index)
        held = [block for placement in self.sets[index] for block in layout.held(placement, rank)]
        return Plan(
            rank=rank,
            layout=layout,
            members=members,
            held=tuple(sorted(held, key=lambda block: not layout.shares_rows(block.placement))),
            charges=self.charges,
            left=self._reduction(rank, {k: self._sum_of_left(k) for k in members}),
            part_sums=self._part_sums(rank, members),
            grams=self._grams(rank, members),
            shared_rows=self._shared_rows(rank, held),
        )

    def _reduction(self, rank: Rank, sums: dict[int, "_Sum"]) -> Reduction:
        return _reduction(self.layout, rank, sums)

    def _sum_of_left(self, matrix: int) -> "_Sum":
        return _Sum(self.layout.columns_of_holders[matrix], self.charges[matrix])

    def _part_sums(self, rank: Rank, members: Sequence[int]) -> tuple[Reduction, ...]:
        """Whoever has rows of a divided P gets the sum of what all of them bring."""
        config, matrices = self.layout.config, self.layout.matrices
        divided = [k for k in members if len(self.charges[k]) > 1]
        if not divided:
            return ()
        heights = {
            k: summed_rows(config.orthonormalizer, matrices[k].rank, config.oversample)
            for k in divided
        }
        phases = len(heights[divided[0]])
        participants = {k: [charge.rank for charge in self.charges[k]] for k in divided}
        return tuple(
            self._reduction(
                rank, {k: _sum_for_all(k, heights[k][phase], participants[k]) for k in divided}
            )
            for phase in range(phases)
        )

    def _grams(self, rank: Rank, members: Sequence[int]) -> Reduction | None:
        if self.layout.config.right_factor != "orth":
            return None
        matrices = self.layout.matrices
        holders = self.layout.columns_of_holders
        sums = {k: _sum_for_all(k, matrices[k].rank, list(holders[k])) for k in members}
        return self._reduction(rank, sums)

    def _shared_rows(self, rank: Rank, held: Sequence[Held]) -> tuple[tuple[SharedRow, ...], ...]:
        size = self.layout.grid.data_parallel_size
        shared: list[set[SharedRow]] = [set() for _ in range(size)]
        for block in held:
            if block.rectangle.cut:
                placement = self.layout.placements[block.placement]
                start, _ = placement.piece(rank.data_parallel, size)
                width = placement.weight.columns
                first = (start + block.rectangle.offset) // width * width
                for peer in placement.holders(size, first, first + width):
                    if peer != rank.data_parallel:
                        shared[peer].add(SharedRow(block.matrix, block.rectangle.row_start))
        return tuple(tuple(sorted(rows, key=lambda row: (row.matrix, row.row))) for rows in shared)


def make_plan(placements: Sequence[Placement], grid: Grid, rank: Rank, config: DionConfig) -> Plan:
    """Plans one rank's work on all matrices at once; arguments as for `Planner`."""
    [plan] = Planner(placements, grid, config).plans(rank)
    return plan


@dataclass(frozen=True)
class _Sum:
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


def _sum_for_all(matrix: int, rows: int, ranks: Sequence[Rank]) -> _Sum:
    """All of the ranks bring all rows, and each is in charge of as many."""
    count = min(rows, len(ranks))
    charges = tuple(
        Charge(matrix, rows * i // count, rows * (i + 1) // count, ranks[i]) for i in range(count)
    )
    return _Sum(dict.fromkeys(ranks, (0, rows)), charges)


def _reduction(layout: Layout, rank: Rank, sums: Mapping[int, _Sum]) -> Reduction:
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
    )
    return Reduction(tensor_hop, data_hop)


def _in_canonical_order(
    matrices: Sequence[Matrix], sums: Mapping[int, _Sum]
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
