"""Who orthonormalizes what: the rows of every P divided over ranks, so that none waits long."""

from collections.abc import Iterable, Sequence
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


def divide(layout: Layout, matrices: Iterable[int], load: dict[Rank, float]) -> Charges:
    """Divides the P of the given matrices over the ranks that hold something of them.

    The most expensive come first, each to its least loaded holders: to one, who then needs nobody
    else to orthonormalize it, unless it alone is more than an even share of the work; then to as
    many as bring it down to that.

    Args:
        layout: who holds what.
        matrices: indices of the matrices.
        load: operations that each rank has to do already; is added to.
    """
    matrices = list(matrices)
    shapes = layout.matrices
    even = sum(operations(shapes[k], shapes[k].columns) for k in matrices) / layout.grid.size
    charges: Charges = {}
    for k in sorted(matrices, key=lambda k: (-operations(shapes[k], shapes[k].columns), k)):
        holders = layout.columns_of_holders[k]
        count = _number_of_charges(layout, k, even, len(holders))
        chosen = sorted(holders, key=lambda rank: (load.get(rank, 0), rank))[:count]
        # In the order of tensor-parallel ranks a row-parallel weight's rows of P are at home.
        charges[k] = _cut(k, shapes[k].columns, sorted(chosen))
        for charge in charges[k]:
            cost = operations(shapes[k], charge.stop - charge.start)
            load[charge.rank] = load.get(charge.rank, 0) + cost
    return charges


def operations(matrix: Matrix, rows: int) -> float:
    """Floating-point operations of `rcqr` for some rows (rows, r) of P.

    Each row costs 2.5 r^2 for its sketch, r^2 for each of two triangular solves and 2 r^2 for the
    Gram matrix. The triangles of the sketch (1.25 r, r), 1.83 r^3, and of the Gram matrix, r^3 / 3,
    are computed by everyone who has rows.
    """
    return 6.5 * rows * matrix.rank**2 + 2.17 * matrix.rank**3


def _number_of_charges(layout: Layout, matrix: int, even: float, holders: int) -> int:
    shape = layout.matrices[matrix]
    most = min(holders, shape.columns)
    if layout.config.orthonormalizer == "qr":
        return 1  # needs all rows
    fixed = operations(shape, 0)
    if operations(shape, shape.columns) <= even:
        return 1
    if even <= fixed:
        return most
    return min(most, -int(-(operations(shape, shape.columns) - fixed) // (even - fixed)))


def _cut(matrix: int, rows: int, ranks: Sequence[Rank]) -> tuple[Charge, ...]:
    count = len(ranks)
    return tuple(
        Charge(matrix, rows * i // count, rows * (i + 1) // count, rank)
        for i, rank in enumerate(ranks)
    )
