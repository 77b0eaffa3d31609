"""Where the elements of all matrices lie on a grid of ranks, and who owns which P."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.exchange import Matrix
from megatron_dion.sharding.blocks import Rectangle, rectangles
from megatron_dion.sharding.matrices import Weight


@dataclass(frozen=True)
class Placement:
    """Where the distributed optimizer keeps a weight: at `start` in a flat bucket."""

    weight: Weight
    start: int  # its first element, counted from the bucket's first
    bucket_numel: int  # elements of the bucket, cut evenly over the data-parallel ranks

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


LEAST_BUCKET = 40_000_000
"""Elements of Megatron's smallest bucket where the user gives no size."""


def dion_bucket_size(elements: int, usual: int) -> int:
    """Elements of a gradient bucket of Dion's: eight cut few matrices, and most of it overlaps."""
    return max(usual, -(-elements // 8))


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

    def tensor_group(self, data_parallel_rank: int) -> list["Rank"]:
        """The ranks of a tensor-parallel group."""
        return [Rank(t, data_parallel_rank) for t in range(self.tensor_parallel_size)]


@dataclass(frozen=True, order=True)
class Rank:
    """Coordinates in a `Grid`."""

    tensor_parallel: int = 0
    data_parallel: int = 0


class Layout:
    """All matrices of weights, the same list on every rank, and who holds which elements."""

    def __init__(self, placements: Sequence[Placement], grid: Grid, config: DionConfig) -> None:
        self.placements = tuple(placements)
        self.grid = grid
        self.config = config
        matrices: list[Matrix] = []
        matrices_of: list[range] = []
        for placement in placements:
            first = len(matrices)
            matrices += placement.weight.matrices(config)
            matrices_of.append(range(first, len(matrices)))
        self.matrices = tuple(matrices)  # in the order of their weights
        self.matrices_of = tuple(matrices_of)  # by placement, the indices of its matrices
        # Of the instance: a cached method would keep every layout alive.
        self.rectangles = lru_cache(maxsize=1 << 16)(self._rectangles)

    def _rectangles(self, placement: int, rank: Rank) -> tuple[Rectangle, ...]:
        """What a rank holds of the matrices of a weight, in the order of memory."""
        where = self.placements[placement]
        start, stop = where.piece(rank.data_parallel, self.grid.data_parallel_size)
        first = self.matrices_of[placement].start
        return rectangles(where.weight, rank.tensor_parallel, start, stop, first)

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """For each matrix the data-parallel ranks whose tensor-parallel groups hold any of it."""
        size = self.grid.data_parallel_size
        ranks: list[set[int]] = [set() for _ in self.matrices]
        for placement, indices in zip(self.placements, self.matrices_of, strict=True):
            weight = placement.weight
            for t in range(self.grid.tensor_parallel_size):
                for segment in weight.segments(t):
                    first, last = segment.local_row, segment.local_row + segment.rows
                    ranks[indices[segment.part]].update(
                        placement.holders(size, first * weight.columns, last * weight.columns)
                    )
        return tuple(tuple(sorted(each)) for each in ranks)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """For each matrix the data-parallel rank whose tensor-parallel group orthonormalizes P.

        Matrices with one holder come first, then by cost; each goes to its least loaded holder.
        """
        costs = [matrix.columns * matrix.rank**2 for matrix in self.matrices]
        loads = [0] * self.grid.data_parallel_size
        owners = [0] * len(costs)
        for k in sorted(range(len(costs)), key=lambda k: (len(self.holders[k]) > 1, -costs[k])):
            owners[k] = min(self.holders[k], key=lambda d: loads[d])
            loads[owners[k]] += costs[k]
        return tuple(owners)

    def owned_rows(self, matrix: int, tensor_parallel_rank: int) -> tuple[int, int]:
        """The rows of P that a rank of the owning tensor-parallel group orthonormalizes."""
        return self._even_part(self.matrices[matrix].columns, tensor_parallel_rank)

    def shares_rows(self, placement: int) -> bool:
        """Whether tensor-parallel ranks hold the same rows: other columns of them, or copies."""
        weight = self.placements[placement].weight
        return self.grid.tensor_parallel_size > 1 and weight.partition_dim != 0

    def tensor_slice(self, placement: int, length: int, rank: Rank) -> slice:
        """Those of `length` rows or columns that are a rank's own.

        Tensor-parallel ranks that hold the same rows divide them; elsewhere all are a rank's own.
        """
        if not self.shares_rows(placement):
            return slice(0, length)
        return slice(*self._even_part(length, rank.tensor_parallel))

    def _even_part(self, length: int, tensor_parallel_rank: int) -> tuple[int, int]:
        size = self.grid.tensor_parallel_size
        first, last = tensor_parallel_rank, tensor_parallel_rank + 1
        return length * first // size, length * last // size

    def local_row(self, placement: int, rectangle: Rectangle, rank: Rank) -> int:
        """The row of the rank's parameter with which a rectangle begins."""
        where = self.placements[placement]
        start, _ = where.piece(rank.data_parallel, self.grid.data_parallel_size)
        return (start + rectangle.offset) // where.weight.columns

    def holders_of_cut_row(self, placement: int, rectangle: Rectangle, rank: Rank) -> range:
        """The data-parallel ranks that hold columns of a rectangle's row, if its row is cut."""
        if not rectangle.cut:
            return range(0)
        where = self.placements[placement]
        size, width = self.grid.data_parallel_size, where.weight.columns
        first = self.local_row(placement, rectangle, rank) * width
        return where.holders(size, first, first + width)

    def cut_rows(self, placement: int) -> tuple[int, ...]:
        """Rows of the parameter whose columns lie on several data-parallel ranks."""
        where, size = self.placements[placement], self.grid.data_parallel_size
        ends = [divmod(where.piece(d, size)[1], where.weight.columns) for d in where.holders(size)]
        return tuple(dict.fromkeys(row for row, columns in ends if columns))
