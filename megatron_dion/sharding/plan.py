"""Who holds, sums and decides what: a pure function of shapes and sizes.

Every rank of a grid of tensor-parallel x data-parallel ranks computes its own plan from the same
list of placements, so the plans of all ranks fit each other without a word being exchanged, and
any rank of any grid can be planned and tested in one process.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_dion.algorithm import DionConfig, Matrix
from megatron_dion.algorithm.orthonormalize import packed_rows, summed_rows
from megatron_dion.sharding.balance import Charge, Charges, divide
from megatron_dion.sharding.layout import Grid, Held, Layout, Placement, Rank
from megatron_dion.sharding.reduction import Reduction, Sum, Tile, reduction, sum_for_all


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
        owners: who brings the triangles of sections of P together, the same on every rank.
        joiners: the same of all P with several charges, should sums be no use.
        left: sums P.
        part_sums: by method the sums that orthonormalizing divided P so needs, one after the other,
            of those that usually are done so; empty if no P of the set is divided.
        right: sums what turns R into Q: squared norms of its columns, or R^T R.
        shared_rows: for each data-parallel peer the rows of which both hold columns.
        has_shared_rows: whether there are any on any rank.
        has_partial_rows: whether R of any block on any rank is a sum over tensor-parallel ranks.
    """

    rank: Rank
    layout: Layout
    members: tuple[int, ...]
    held: tuple[Held, ...]
    charges: Charges
    owners: Mapping[int, Rank]
    joiners: Mapping[int, Rank]
    left: Reduction
    part_sums: Mapping[str, tuple[Reduction, ...]]
    right: Reduction
    shared_rows: tuple[tuple[SharedRow, ...], ...]
    has_shared_rows: bool
    has_partial_rows: bool

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.layout.matrices

    @property
    def divided(self) -> list[int]:
        """The members whose P several ranks orthonormalize together, by sums."""
        return _divided(self.members, self.charges, self.owners)

    @property
    def merged(self) -> list[int]:
        """The members whose P tensor-parallel ranks orthonormalize together, by triangles."""
        return [k for k in self.members if k in self.owners]

    @property
    def assembled(self) -> dict[int, tuple[int, int]]:
        """The hull of the rows of each P of which this rank sends several tiles."""
        tiles: defaultdict[int, list[Tile]] = defaultdict(list)
        for sent in self.left.tensor_hop.sends:
            for tile in sent:
                tiles[tile.matrix].append(tile)
        return {
            matrix: (min(tile.start for tile in several), max(tile.stop for tile in several))
            for matrix, several in tiles.items()
            if len(several) > 1
        }

    def is_partial(self, held: Held) -> bool:
        """Whether R of a block is a sum over tensor-parallel ranks."""
        return self.layout.shares_rows(held.placement)

    @property
    def part_reductions(self) -> list[Reduction]:
        """Of all methods."""
        return [each for phases in self.part_sums.values() for each in phases]

    def merging(self, matrices: Iterable[int]) -> Reduction:
        """Brings the packed triangles of the sections of some P together on one rank each."""
        sums = merging_sums(self.layout, self.charges, self.joiners, matrices)
        return reduction(self.layout, self.rank, sums)


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
        division = divide(self.layout)
        self.charges: Charges = division.charges
        self.owners = division.owners
        self.joiners = _joiners(self.charges, self.owners)

    def in_sets(self, sets: Sequence[Sequence[int]]) -> "Planner":
        """The same with other sets; who is in charge of what does not depend on them."""
        other = copy(self)
        other.sets = [tuple(chosen) for chosen in sets]
        return other

    def members(self, index: int) -> tuple[int, ...]:
        """The matrices of a set."""
        layout = self.layout
        bounds = [*layout.first_matrix, len(layout.matrices)]
        return tuple(
            matrix
            for placement in sorted(self.sets[index])
            for matrix in range(bounds[placement], bounds[placement + 1])
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
            owners=self.owners,
            joiners=self.joiners,
            left=reduction(layout, rank, self.left_sums(index)),
            part_sums={
                method: tuple(reduction(layout, rank, sums) for sums in phases)
                for method, phases in self.part_sums(index).items()
            },
            right=reduction(layout, rank, self.right_sums(members)),
            shared_rows=self._shared_rows(rank, held),
            has_shared_rows=any(map(layout.has_cut_rows, self.sets[index])),
            has_partial_rows=any(map(layout.shares_rows, self.sets[index])),
        )

    def left_sums(self, index: int) -> dict[int, Sum]:
        """The P of a set's matrices."""
        columns = self.layout.columns_of_holders
        return {k: Sum(columns[k], self.charges[k]) for k in self.members(index)}

    def divided(self, index: int) -> list[int]:
        """The matrices of a set whose P several ranks orthonormalize together, by sums."""
        return _divided(self.members(index), self.charges, self.owners)

    def divided_by_method(self, index: int) -> dict[str, list[int]]:
        """The same, by how they usually are done."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for k in self.divided(index):
            found[self.layout.part_method(k)].append(k)
        return found

    def merging_sums(self, matrices: Iterable[int]) -> dict[int, Sum]:
        """The triangles of sections of some P, for those who bring them together."""
        return merging_sums(self.layout, self.charges, self.joiners, matrices)

    def part_sums(self, index: int) -> dict[str, tuple[dict[int, Sum], ...]]:
        """What the divided P of a set usually need, by method: sums for all who have rows of it."""
        layout = self.layout
        found = {}
        for method, members in self.divided_by_method(index).items():
            heights = [
                summed_rows(method, layout.matrices[k].rank, layout.config.oversample)
                for k in members
            ]
            found[method] = tuple(
                {
                    k: sum_for_all(k, rows, [charge.rank for charge in self.charges[k]])
                    for k, rows in zip(members, phase, strict=True)
                }
                for phase in zip(*heights, strict=True)
            )
        return found

    def right_sums(self, matrices: Iterable[int]) -> dict[int, Sum]:
        """What turns R into Q, (k, r): sums for all who hold any of a matrix, if they are several.

        k is one for the norms of R's columns, and r for R^T R. Who sums norms takes turns.
        """
        is_gram = self.layout.config.right_factor == "orth"
        found = {}
        for k in matrices:
            holders = list(self.layout.columns_of_holders[k])
            first = k % len(holders)
            if len(holders) > 1:
                rows = self.layout.matrices[k].rank if is_gram else 1
                found[k] = sum_for_all(k, rows, holders[first:] + holders[:first])
        return found

    def _shared_rows(self, rank: Rank, held: Sequence[Held]) -> tuple[tuple[SharedRow, ...], ...]:
        size = self.layout.grid.data_parallel_size
        shared: list[set[SharedRow]] = [set() for _ in range(size)]
        for block in held:
            for peer in self.layout.holders_of_cut_row(block, rank):
                if peer != rank.data_parallel:
                    shared[peer].add(SharedRow(block.matrix, block.rectangle.row_start))
        return tuple(tuple(sorted(rows, key=lambda row: (row.matrix, row.row))) for rows in shared)


def _divided(members: Iterable[int], charges: Charges, owners: Mapping[int, Rank]) -> list[int]:
    return [k for k in members if len(charges[k]) > 1 and k not in owners]


def _joiners(charges: Charges, owners: Mapping[int, Rank]) -> dict[int, Rank]:
    """Who joins the triangles of a P with several charges: its owner, or one in charge by turns.

    The same whatever else is joined, so that nothing needs more buffers than its parts do.
    """
    by_turns = {
        k: charges[k][turn % len(charges[k])].rank
        for turn, k in enumerate(_divided(sorted(charges), charges, owners))
    }
    return by_turns | dict(owners)


def merging_sums(
    layout: Layout, charges: Charges, joiners: Mapping[int, Rank], matrices: Iterable[int]
) -> dict[int, Sum]:
    """Brings the packed triangles of sections of some P to those who join them.

    Each is a charge of its own: what a tensor-parallel group brings would else be the hull of its
    triangles, which may lie far apart.
    """
    found = {}
    for k in matrices:
        width, joiner = layout.matrices[k].rank, joiners[k]
        heights = (packed_rows(charge.stop - charge.start, width) for charge in charges[k])
        bounds = list(pairwise(accumulate(heights, initial=0)))
        found[k] = Sum(
            {charge.rank: rows for charge, rows in zip(charges[k], bounds, strict=True)},
            tuple(Charge(k, *rows, joiner) for rows in bounds),
        )
    return found
