"""Where the elements of all matrices lie on a grid of ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from megatron_dion.algorithm import DionConfig, Matrix
from megatron_dion.algorithm.orthonormalize import usual_part_method
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

    def holders(self, data_parallel_size: int, first: int = 0, last: int | None = None) -> range:
        """The data-parallel ranks that hold any of the elements first:last (all by default)."""
        shard = self.bucket_numel // data_parallel_size
        end = self.start + (self.weight.rows * self.weight.columns if last is None else last)
        return range((self.start + first) // shard, (end - 1) // shard + 1)


@dataclass(frozen=True)
class Grid:
    """Number of ranks that share one set of matrices."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1

    @property
    def size(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size

    def ranks(self) -> Iterator["Rank"]:
        """All ranks, those of a data-parallel index side by side."""
        sizes = (range(self.data_parallel_size), range(self.tensor_parallel_size))
        return (Rank(t, d) for d, t in product(*sizes))

    def tensor_group(self, rank: "Rank") -> list["Rank"]:
        """The ranks of a rank's tensor-parallel group."""
        return [Rank(t, rank.data_parallel) for t in range(self.tensor_parallel_size)]


@dataclass(frozen=True, order=True)
class Rank:
    """Coordinates in a `Grid`."""

    tensor_parallel: int = 0
    data_parallel: int = 0


@dataclass(frozen=True)
class Held:
    """A block on a rank.

    Attributes:
        placement: index of its weight.
        matrix: index of its matrix.
        rectangle: which rows and columns.
        multiplied: the rows, from the rectangle's first, for which the rank computes products.
    """

    placement: int
    matrix: int
    rectangle: Rectangle
    multiplied: slice


class Layout:
    """All matrices of a set of weights, and who holds which of their elements.

    Args:
        placements: the weights, the same list on every rank of the grid.
        grid: the ranks.
        config: gives the matrices' ranks.

    Attributes:
        matrices: all of them, in the order of their weights.
        first_matrix: for each placement the index of its first matrix.
    """

    def __init__(self, placements: Sequence[Placement], grid: Grid, config: DionConfig) -> None:
        self.placements = placements
        self.grid = grid
        self.config = config
        matrices: list[Matrix] = []
        first_matrix = []
        placement_of: list[int] = []
        for index, placement in enumerate(placements):
            first_matrix.append(len(matrices))
            found = placement.weight.matrices(config)
            matrices += found
            placement_of += [index] * len(found)
        self.matrices = tuple(matrices)
        self.first_matrix = tuple(first_matrix)
        self._placement_of = placement_of

    def placement(self, matrix: int) -> Placement:
        """The placement of a matrix's weight."""
        return self.placements[self._placement_of[matrix]]

    def part_method(self, matrix: int) -> str:
        """How P is usually orthonormalized if its rows are divided over ranks."""
        shape = self.matrices[matrix]
        return usual_part_method(self.config.orthonormalizer, shape.columns, shape.rank)

    def shares_rows(self, placement: int) -> bool:
        """Whether tensor-parallel ranks hold the same rows: other columns of them, or copies."""
        weight = self.placements[placement].weight
        return self.grid.tensor_parallel_size > 1 and weight.partition_dim != 0

    def is_duplicated(self, placement: int) -> bool:
        """Whether every tensor-parallel rank holds the same elements."""
        weight = self.placements[placement].weight
        return self.grid.tensor_parallel_size > 1 and weight.partition_dim is None

    def held(self, placement: int, rank: Rank) -> list[Held]:
        """A rank's blocks of a weight, in their order in memory."""
        where = self.placements[placement]
        start, stop = where.piece(rank.data_parallel, self.grid.data_parallel_size)
        if start == stop:
            return []
        first = self.first_matrix[placement]
        return [
            Held(placement, first + block.part, block, self._multiplied(placement, block, rank))
            for block in rectangles(where.weight, rank.tensor_parallel, start, stop)
        ]

    def holders_of_cut_row(self, block: Held, rank: Rank) -> range:
        """The data-parallel ranks that hold columns of a block's row, if its row is cut."""
        if not block.rectangle.cut:
            return range(0)
        placement = self.placements[block.placement]
        size, width = self.grid.data_parallel_size, placement.weight.columns
        start, _ = placement.piece(rank.data_parallel, size)
        first = (start + block.rectangle.offset) // width * width
        return placement.holders(size, first, first + width)

    def has_cut_rows(self, placement: int) -> bool:
        """Whether columns of any row lie on several data-parallel ranks."""
        where, size = self.placements[placement], self.grid.data_parallel_size
        return any(where.piece(d, size)[1] % where.weight.columns for d in where.holders(size))

    def share(self, placement: int, numel: int, rank: Rank) -> slice:
        """The part that is a tensor-parallel rank's of something that all of them have."""
        if not self.shares_rows(placement):
            return slice(0, numel)
        size = self.grid.tensor_parallel_size
        first, last = rank.tensor_parallel, rank.tensor_parallel + 1
        return slice(numel * first // size, numel * last // size)

    def _multiplied(self, placement: int, block: Rectangle, rank: Rank) -> slice:
        """Copies on tensor-parallel ranks: each multiplies some of the rows."""
        if self.is_duplicated(placement):
            return self.share(placement, block.rows, rank)
        return slice(0, block.rows)

    @cached_property
    def columns_of_holders(self) -> tuple[dict[Rank, tuple[int, int]], ...]:
        """For each matrix and each rank that holds any of it, the hull of its columns there."""
        hulls: list[dict[Rank, tuple[int, int]]] = [{} for _ in self.matrices]
        for index, placement in enumerate(self.placements):
            for d in placement.holders(self.grid.data_parallel_size):
                for rank in self.grid.tensor_group(Rank(0, d)):
                    for block in self.held(index, rank):
                        _widen(hulls[block.matrix], rank, block.rectangle)
        return tuple(hulls)


def _widen(hulls: dict[Rank, tuple[int, int]], rank: Rank, block: Rectangle) -> None:
    start, stop = hulls.get(rank, (block.column_start, block.column_stop))
    hulls[rank] = min(start, block.column_start), max(stop, block.column_stop)
