"""Who holds, sums and decides what: a pure function of shapes and sizes.

Every rank of a grid of tensor-parallel x data-parallel ranks computes its own plan from the same
list of placements, so the plans of all ranks fit each other without a word being exchanged, and
any rank of any grid can be planned and tested in one process.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_dion.algorithm import DionConfig, Matrix
from megatron_dion.sharding.blocks import Rectangle, rectangles
from megatron_dion.sharding.matrices import Weight


@dataclass(frozen=True)
class Placement:
    """Where the distributed optimizer keeps a weight: at `start` in a flat bucket.

    Attributes:
        weight: the weight.
        start: its first element, counted from the bucket's first.
        bucket_numel: elements of the bucket, which is cut evenly over the data-parallel ranks.
    """

    weight: Weight
    start: int
    bucket_numel: int

    def piece(self, data_parallel_rank: int, data_parallel_size: int) -> tuple[int, int]:
        """First and one past last element of the flattened weight that a rank holds."""
        shard = self.bucket_numel // data_parallel_size
        numel = self.weight.rows * self.weight.columns
        first = data_parallel_rank * shard - self.start
        return min(max(first, 0), numel), min(max(first + shard, 0), numel)

    def holders(self, data_parallel_size: int) -> range:
        """The data-parallel ranks that hold a piece."""
        shard = self.bucket_numel // data_parallel_size
        last = self.start + self.weight.rows * self.weight.columns - 1
        return range(self.start // shard, last // shard + 1)


@dataclass(frozen=True)
class Grid:
    """Number of ranks that share one set of matrices."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1


@dataclass(frozen=True)
class Rank:
    """Coordinates in a `Grid`."""

    tensor_parallel: int = 0
    data_parallel: int = 0


@dataclass(frozen=True)
class Tile:
    """Rows start:stop of the left factor P of one matrix."""

    matrix: int
    start: int
    stop: int


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
class SharedRow:
    """A row of a matrix whose columns lie on several data-parallel ranks."""

    matrix: int
    row: int


@dataclass(frozen=True)
class Plan:
    """What one rank does in a step.

    Attributes:
        matrices: all matrices of the set, the same on every rank of the grid.
        pieces: for each placement the rectangles that this rank holds.
        first_matrix: for each placement the index of its first matrix.
        tensor_hop: sums tiles over the tensor-parallel group.
        data_hop: sums the sums of `tensor_hop` over the data-parallel group, to whole P.
        shared_rows: for each data-parallel peer the rows of which both hold columns.
    """

    matrices: tuple[Matrix, ...]
    pieces: tuple[tuple[Rectangle, ...], ...]
    first_matrix: tuple[int, ...]
    tensor_hop: Hop
    data_hop: Hop
    shared_rows: tuple[tuple[SharedRow, ...], ...]


def make_plan(placements: Sequence[Placement], grid: Grid, rank: Rank, config: DionConfig) -> Plan:
    """Plans one rank's work.

    Args:
        placements: the weights of the set, the same list on every rank of the grid.
        grid: the ranks.
        rank: this rank.
        config: gives the matrices' ranks.
    """
    planner = _Planner(placements, grid, config)
    return Plan(
        matrices=planner.matrices,
        pieces=tuple(planner.piece(index, rank) for index in range(len(placements))),
        first_matrix=planner.first_matrix,
        tensor_hop=planner.tensor_hop(rank),
        data_hop=planner.data_hop(rank),
        shared_rows=planner.shared_rows(rank),
    )


class _Planner:
    """Answers questions about any rank of the grid."""

    def __init__(self, placements: Sequence[Placement], grid: Grid, config: DionConfig) -> None:
        self.placements = placements
        self.grid = grid
        matrices: list[Matrix] = []
        first_matrix = []
        self._placement_of: list[int] = []
        for index, placement in enumerate(placements):
            first_matrix.append(len(matrices))
            found = placement.weight.matrices(config)
            matrices += found
            self._placement_of += [index] * len(found)
        self.matrices = tuple(matrices)
        self.first_matrix = tuple(first_matrix)
        self.piece = lru_cache(maxsize=None)(self._piece)

    def _piece(self, placement: int, rank: Rank) -> tuple[Rectangle, ...]:
        start, stop = self.placements[placement].piece(
            rank.data_parallel, self.grid.data_parallel_size
        )
        return rectangles(self.placements[placement].weight, rank.tensor_parallel, start, stop)

    def _holders(self, matrix: int) -> range:
        placement = self.placements[self._placement_of[matrix]]
        return placement.holders(self.grid.data_parallel_size)

    def _is_duplicated(self, matrix: int) -> bool:
        """Whether every tensor-parallel rank holds the same elements."""
        return self.placements[self._placement_of[matrix]].weight.partition_dim is None

    @cached_property
    def charges(self) -> tuple[Rank, ...]:
        """The rank that orthonormalizes each matrix: among its holders, balanced by operations.

        For a duplicated matrix the tensor-parallel coordinate has no meaning: each rank is in
        charge of its own copy.
        """
        load: dict[Rank, int] = {}
        charges: dict[int, Rank] = {}
        for matrix in sorted(range(len(self.matrices)), key=lambda k: (-self._cost(k), k)):
            duplicated = self._is_duplicated(matrix)
            tensor_ranks = range(1 if duplicated else self.grid.tensor_parallel_size)
            candidates = [
                Rank(t, d)
                for d in self._holders(matrix)
                for t in tensor_ranks
                if self._summed_tile(matrix, Rank(t, d)) is not None
            ]
            chosen = min(candidates, key=lambda rank: load.get(rank, 0))
            charges[matrix] = chosen
            for t in range(self.grid.tensor_parallel_size if duplicated else 0):
                busy = Rank(t, chosen.data_parallel)
                load[busy] = load.get(busy, 0) + self._cost(matrix)
            if not duplicated:
                load[chosen] = load.get(chosen, 0) + self._cost(matrix)
        return tuple(charges[matrix] for matrix in range(len(self.matrices)))

    def _cost(self, matrix: int) -> int:
        return self.matrices[matrix].columns * self.matrices[matrix].rank ** 2

    def _tile(self, matrix: int, rank: Rank) -> Tile | None:
        """The rows of P to which a rank contributes: the hull of its columns."""
        placement = self._placement_of[matrix]
        part = matrix - self.first_matrix[placement]
        held = [block for block in self.piece(placement, rank) if block.part == part]
        if not held:
            return None
        start = min(block.column_start for block in held)
        return Tile(matrix, start, max(block.column_stop for block in held))

    def _summed_tile(self, matrix: int, rank: Rank) -> Tile | None:
        """The hull of the tiles of a tensor-parallel group."""
        if self._is_duplicated(matrix):
            return self._tile(matrix, rank)
        tiles = self._tiles([matrix], self._tensor_group(rank))
        if not tiles:
            return None
        start = min(tile.start for tile in tiles)
        return Tile(matrix, start, max(tile.stop for tile in tiles))

    def _tensor_group(self, rank: Rank) -> list[Rank]:
        return [Rank(t, rank.data_parallel) for t in range(self.grid.tensor_parallel_size)]

    def _data_group(self, rank: Rank) -> list[Rank]:
        return [Rank(rank.tensor_parallel, d) for d in range(self.grid.data_parallel_size)]

    def _tiles(self, matrices: Iterable[int], ranks: Iterable[Rank]) -> list[Tile]:
        tiles = (self._tile(matrix, rank) for rank in ranks for matrix in matrices)
        return [tile for tile in tiles if tile is not None]

    @cached_property
    def _by_shape(self) -> list[int]:
        """All matrices, those whose P have the same shape side by side."""
        shape = [(matrix.columns, matrix.rank) for matrix in self.matrices]
        return sorted(range(len(self.matrices)), key=lambda k: (shape[k], k))

    def _charged_in_tensor_group(self, peer: Rank, viewer: Rank) -> list[int]:
        """Matrices of which `peer` sums the tiles that `viewer` holds."""
        return [
            matrix
            for matrix in sorted(self._by_shape, key=lambda k: self.charges[k].data_parallel)
            if (
                peer == viewer
                if self._is_duplicated(matrix)
                else self.charges[matrix].tensor_parallel == peer.tensor_parallel
            )
        ]

    def tensor_hop(self, rank: Rank) -> Hop:
        group = self._tensor_group(rank)
        mine = self._charged_in_tensor_group(rank, rank)
        sums = (self._summed_tile(matrix, rank) for matrix in mine)
        return Hop(
            sends=tuple(
                tuple(self._tiles(self._charged_in_tensor_group(peer, rank), [rank]))
                for peer in group
            ),
            receives=tuple(
                tuple(self._tiles(self._charged_in_tensor_group(rank, peer), [peer]))
                for peer in group
            ),
            sums=tuple(tile for tile in sums if tile is not None),
        )

    def data_hop(self, rank: Rank) -> Hop:
        mine = self._charged_in_tensor_group(rank, rank)

        def tiles(holder: Rank, owner: Rank) -> tuple[Tile, ...]:
            owned = (k for k in mine if self.charges[k].data_parallel == owner.data_parallel)
            found = (self._summed_tile(matrix, holder) for matrix in owned)
            return tuple(tile for tile in found if tile is not None)

        group = self._data_group(rank)
        return Hop(
            sends=tuple(tiles(rank, peer) for peer in group),
            receives=tuple(tiles(peer, rank) for peer in group),
            sums=tuple(
                Tile(matrix, 0, self.matrices[matrix].columns)
                for matrix in mine
                if self.charges[matrix].data_parallel == rank.data_parallel
            ),
        )

    def shared_rows(self, rank: Rank) -> tuple[tuple[SharedRow, ...], ...]:
        mine = self._cut_rows(rank)
        return tuple(
            tuple(sorted(mine & self._cut_rows(peer), key=lambda row: (row.matrix, row.row)))
            if peer != rank
            else ()
            for peer in self._data_group(rank)
        )

    def _cut_rows(self, rank: Rank) -> set[SharedRow]:
        return {
            SharedRow(first + block.part, block.row_start)
            for placement, first in enumerate(self.first_matrix)
            for block in self.piece(placement, rank)
            if block.cut
        }
