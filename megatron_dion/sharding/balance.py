"""Who orthonormalizes what: the rows of every P divided over ranks, so that none waits long."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_dion.algorithm import Matrix
from megatron_dion.sharding.layout import Layout, Rank


@dataclass(frozen=True)
class Charge:
    """A rank sums and orthonormalizes rows start:stop of the P of a matrix."""

    matrix: int
    start: int
    stop: int
    rank: Rank


Charges = dict[int, tuple[Charge, ...]]
"""For each matrix its charges, which cover the rows of its P in their order."""

# A divided matrix comes down to this share of a rank's mean work: less of it would be more even and
# send more, the sums that a divided P needs.
_EVEN_SHARE = 0.5


class _Burden:
    """What ranks have to do in a step, nearly: operations, numbers sent, numbers added up."""

    def __init__(self) -> None:
        self._total: Counter[str] = Counter()
        self._of: defaultdict[str, Counter[Rank]] = defaultdict(Counter)

    def add(self, kind: str, rank: Rank, amount: float) -> None:
        self._of[kind][rank] += amount  # type: ignore[assignment]  # counters count floats too
        self._total[kind] += amount  # type: ignore[assignment]

    def share(self, rank: Rank) -> float:
        """A rank's share of everyone's burden, of the kind of which its share is largest."""
        return max(found[rank] / (self._total[kind] or 1) for kind, found in self._of.items())


def divide(layout: Layout) -> Charges:
    """Divides the P of all matrices over ranks at or near those that hold the matrices.

    The most expensive come first. One that is less than an even share of the work goes to its least
    burdened holder, who then needs nobody else to orthonormalize it, and nothing is sent if he
    holds all of it. Others go to as many ranks as bring them down to such a share, and these may be
    their neighbours in the data-parallel group: every holder sends its P away in any case.
    """
    shapes = layout.matrices
    cost = [operations(matrix, matrix.columns) for matrix in shapes]
    burden = _Burden()
    for matrix, holders in zip(shapes, layout.columns_of_holders, strict=True):
        for rank, (start, stop) in holders.items():
            burden.add("sent", rank, (stop - start) * matrix.rank)
    mean = sum(cost) / layout.grid.size
    charges: Charges = {}
    # The second time, everyone's burden is known.
    for k in 2 * sorted(range(len(shapes)), key=lambda k: (-cost[k], k)):
        holders = layout.columns_of_holders[k]
        data_ranks = {rank.data_parallel for rank in holders}
        if k in charges:
            _add(burden, layout, charges[k], data_ranks, sign=-1)
        near = _neighbourhood(layout, data_ranks)
        most = min(len(near), _most(len(holders)), shapes[k].columns)
        count = _number_of_charges(layout, shapes[k], mean, most)
        candidates = near if count > 1 else list(holders)
        chosen = sorted(
            candidates,
            key=lambda rank: (
                burden.share(rank),
                rank not in holders,
                rank.data_parallel,
                rank.tensor_parallel,
            ),
        )[:count]
        # In the order of tensor-parallel ranks a row-parallel weight's rows of P are at home.
        charges[k] = cut(k, shapes[k].columns, sorted(chosen))
        _add(burden, layout, charges[k], data_ranks)
    return charges


def operations(matrix: Matrix, rows: int) -> float:
    """Floating-point operations of `rcqr` for some rows (rows, r) of P.

    Each row costs 2.5 r^2 for its sketch, r^2 for each of two triangular solves and 2 r^2 for the
    Gram matrix. The triangles of the sketch (1.25 r, r), 1.83 r^3, and of the Gram matrix, r^3 / 3,
    are computed by everyone who has rows.
    """
    return 6.5 * rows * matrix.rank**2 + 2.17 * matrix.rank**3


def _neighbourhood(layout: Layout, data_ranks: Collection[int]) -> list[Rank]:
    """All ranks at some data-parallel indices, and at half as many before and after them."""
    more = (len(data_ranks) + 1) // 2
    first = max(0, min(data_ranks) - more)
    last = min(layout.grid.data_parallel_size - 1, max(data_ranks) + more)
    return [rank for d in range(first, last + 1) for rank in layout.grid.tensor_group(Rank(0, d))]


def _most(holders: int) -> int:
    """More charges than holders make the work more even, and the sums of divided P longer."""
    return holders * 8 // 5


def _number_of_charges(layout: Layout, matrix: Matrix, mean: float, most: int) -> int:
    """One, unless that is more than a rank's mean work; then what brings it down well below."""
    fixed = operations(matrix, 0)
    divisible = operations(matrix, matrix.columns) - fixed
    if fixed + divisible <= mean or layout.config.orthonormalizer == "qr":  # qr needs all rows
        return 1
    share = _EVEN_SHARE * mean
    return most if share <= fixed else min(most, math.ceil(divisible / (share - fixed)))


def _add(
    burden: _Burden,
    layout: Layout,
    charges: Sequence[Charge],
    data_ranks: Collection[int],
    sign: int = 1,
) -> None:
    """What a matrix's charges cost those who have them, and who sums for them in tensor groups."""
    matrix, size = layout.matrices[charges[0].matrix], layout.grid.tensor_parallel_size
    # Tensor-parallel ranks have different columns of a row-parallel weight, so rows of P come once.
    tiles = 1 if layout.placement(charges[0].matrix).weight.partition_dim == 1 else size
    rows_for: Counter[int] = Counter()
    for charge in charges:
        rows = charge.stop - charge.start
        rows_for[charge.rank.tensor_parallel] += rows
        # Sketches (1.25 r, r) and Gram matrices of divided P are summed, there and back.
        small = 2.25 * matrix.rank**2 if len(charges) > 1 else 0
        moved = rows * matrix.rank * len(data_ranks)
        burden.add("operations", charge.rank, sign * operations(matrix, rows))
        burden.add("summed", charge.rank, sign * (moved + small))
        burden.add("sent", charge.rank, sign * (moved + 2 * small))
    for t, rows in rows_for.items():
        moved = rows * matrix.rank * tiles
        for d in data_ranks:
            burden.add("summed", Rank(t, d), sign * moved)
            burden.add("sent", Rank(t, d), sign * moved * (size - 1) // size)


def cut(matrix: int, rows: int, ranks: Sequence[Rank]) -> tuple[Charge, ...]:
    """Divides rows evenly over ranks, in their order; there must be no more ranks than rows."""
    count = len(ranks)
    return tuple(
        Charge(matrix, rows * i // count, rows * (i + 1) // count, rank)
        for i, rank in enumerate(ranks)
    )
