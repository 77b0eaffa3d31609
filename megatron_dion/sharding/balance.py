"""Who orthonormalizes what: the rows of every P divided over ranks, so that none waits long."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_dion.algorithm import Matrix
from megatron_dion.algorithm.orthonormalize import ONCE, packed_rows, summed_rows, usual_part_method
from megatron_dion.sharding.collectives import TORCH_DTYPES
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


@dataclass(frozen=True)
class Division:
    """Who does what with every P.

    Attributes:
        charges: for each matrix; several orthonormalize its P together.
        owners: of some matrices with several charges, all in one tensor-parallel group, the rank
            that brings the triangles of their sections together. The others' are done by sums.
    """

    charges: Charges
    owners: dict[int, Rank]


# A divided matrix comes down to this share of a rank's mean work: less of it would be more even and
# send more, the sums that a divided P needs.
_EVEN_SHARE = 0.9

# With tensor parallelism, these sums send at most this share of what P's own sum sends over the
# network.
_NETWORK_SHARE = 0.015


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


def divide(layout: Layout) -> Division:
    """Divides the P of all matrices over ranks that hold the matrices.

    The most expensive come first. One that is less than an even share of the work goes to its least
    burdened holder. If he holds all of it, nothing is sent; if he holds some of its columns only,
    so that his tensor-parallel group has the others, each of them keeps its own rows of P and sends
    him their triangle. Others go to as many of their holders as bring them down to such a share:
    with tensor parallelism ranks of few groups, so that little of it goes over the network.
    """
    shapes = layout.matrices
    cost = [operations(matrix, matrix.columns) for matrix in shapes]
    burden = _Burden()
    for matrix, holders in zip(shapes, layout.columns_of_holders, strict=True):
        for rank, (start, stop) in holders.items():
            burden.add("sent", rank, (stop - start) * matrix.rank)
    mean = sum(cost) / layout.grid.size
    division = Division({}, {})
    # The second time, everyone's burden is known.
    for k in 2 * sorted(range(len(shapes)), key=lambda k: (-cost[k], k)):
        if k in division.charges:
            _add(burden, layout, division, k, sign=-1)
        _divide_one(division, layout, burden, k, mean)
        _add(burden, layout, division, k)
    return division


def _divide_one(division: Division, layout: Layout, burden: _Burden, k: int, mean: float) -> None:
    matrix, holders = layout.matrices[k], layout.columns_of_holders[k]
    sections = _sections_of_tensor_ranks(layout, k)
    candidates = _candidates(layout, burden, k)
    most = min(len(candidates), matrix.columns)
    by_sums = _send_no_more_by_sums(layout, k, sections)
    undivided = _undivided(matrix, sections, by_sums)
    count = _number_of_charges(layout, matrix, undivided, mean, most)
    if by_sums or (count > 1 and _is_row_parallel(layout, k)):
        # Whole tensor-parallel groups, so that its rows of P are at home.
        size = layout.grid.tensor_parallel_size
        count = min(most, math.ceil(count / size) * size)
    division.owners.pop(k, None)
    if count > 1:
        # In the order of tensor-parallel ranks a row-parallel weight's rows of P are at home.
        division.charges[k] = cut(k, matrix.columns, sorted(candidates[:count]))
        return
    alone = min(holders, key=lambda rank: _order(rank, burden))
    if len(sections) == 1:
        division.charges[k] = cut(k, matrix.columns, [alone])
        return
    division.owners[k] = alone
    group = layout.grid.tensor_group(alone)
    division.charges[k] = tuple(
        Charge(k, *rows, rank) for rows, rank in zip(sections, group, strict=True)
    )


def _candidates(layout: Layout, burden: _Burden, k: int) -> list[Rank]:
    """The holders who could share a P, those first who should; of few tensor-parallel groups.

    Sums of g tensor-parallel groups send 2 (g - 1) times their numbers over the network, and P's
    own sum of h such groups 2 (h - 1) n r: there are as many groups as keep the former small.
    """
    matrix, data_ranks = layout.matrices[k], _data_ranks(layout, k)
    if layout.grid.tensor_parallel_size == 1:
        return sorted(layout.columns_of_holders[k], key=lambda rank: _order(rank, burden))
    groups = [layout.grid.tensor_group(Rank(0, d)) for d in data_ranks]
    groups.sort(key=lambda group: max(_order(rank, burden) for rank in group))
    own = (len(data_ranks) - 1) * matrix.columns * matrix.rank
    count = 1 + int(_NETWORK_SHARE * own / _summed_numbers(layout, k))
    ranks = [rank for group in groups[:count] for rank in group]
    if _is_row_parallel(layout, k):
        return ranks
    return sorted(ranks, key=lambda rank: _order(rank, burden))


def _summed_numbers(layout: Layout, k: int) -> int:
    """What the ranks that divide a P sum of it: a Gram matrix, and perhaps a sketch."""
    rank = layout.matrices[k].rank
    return rank * sum(summed_rows(layout.part_method(k), rank, layout.config.oversample))


def _order(rank: Rank, burden: _Burden) -> tuple[float, int, int]:
    return burden.share(rank), rank.data_parallel, rank.tensor_parallel


def _data_ranks(layout: Layout, matrix: int) -> set[int]:
    """The data-parallel ranks of a matrix's holders."""
    return {rank.data_parallel for rank in layout.columns_of_holders[matrix]}


def _is_row_parallel(layout: Layout, matrix: int) -> bool:
    """Whether tensor-parallel ranks have different columns of W, so different rows of P."""
    return (
        layout.grid.tensor_parallel_size > 1 and layout.placement(matrix).weight.partition_dim == 1
    )


def _sections_of_tensor_ranks(layout: Layout, matrix: int) -> list[tuple[int, int]]:
    """The rows of P of which the ranks of a tensor-parallel group send triangles; else all rows.

    Triangles are float32 always, rows have the exchange's type.
    """
    weight, shape = layout.placement(matrix).weight, layout.matrices[matrix]
    wire = TORCH_DTYPES[layout.config.comm_dtype].itemsize
    packed = packed_rows(weight.columns, shape.rank)
    if weight.partition_dim != 1 or 4 * packed >= wire * weight.columns:
        return [(0, shape.columns)]
    firsts = [weight.first_column(t) for t in range(layout.grid.tensor_parallel_size)]
    return [(first, first + weight.columns) for first in firsts]


def _send_no_more_by_sums(layout: Layout, matrix: int, sections: Sequence[tuple[int, int]]) -> bool:
    """Whether sums of a row-parallel weight's P send no more than the triangles of its sections.

    They leave less to compute: nobody has the stack of the triangles.
    """
    start, stop = sections[0]
    is_tall = stop - start >= layout.matrices[matrix].rank
    return len(sections) > 1 and layout.part_method(matrix) == ONCE and is_tall


def operations(matrix: Matrix, rows: int) -> float:
    """Floating-point operations of what `auto` usually does for some rows (rows, r) of P.

    One Cholesky QR costs each row 2 r^2 for the Gram matrix and as much for the result; the
    triangle and its inverse, 4/3 r^3, are computed by everyone who has rows. `rcqr` costs each row
    2.5 r^2 for its sketch, r^2 for each of two triangular solves and 2 r^2 for the Gram matrix; the
    triangles of the sketch (1.25 r, r), 1.83 r^3, and of the Gram matrix, r^3 / 3, are everyone's.
    """
    if usual_part_method("auto", matrix.columns, matrix.rank) == ONCE:
        return 4 * rows * matrix.rank**2 + 4 / 3 * matrix.rank**3
    return 6.5 * rows * matrix.rank**2 + 2.17 * matrix.rank**3


def _height(matrix: Matrix, sections: Sequence[tuple[int, int]]) -> int:
    """Rows of what one rank orthonormalizes: of P, or of the triangles of its sections."""
    [(start, stop), *others] = sections
    if not others:
        return stop - start
    return sum(min(stop - start, matrix.rank) for start, stop in sections)


def work(
    matrix: Matrix, charges: Sequence[Charge], owner: Rank | None
) -> Iterator[tuple[Rank, float]]:
    """Operations of each rank that helps to orthonormalize a P, in those of `auto`.

    Where triangles are brought together, each section has a QR of its own and a product to apply
    what comes back, and the owner has the stack of the triangles.
    """
    for charge in charges:
        rows = charge.stop - charge.start
        if owner is None:
            yield charge.rank, operations(matrix, rows)
        else:
            width = min(rows, matrix.rank)
            own = operations(replace(matrix, columns=rows, rank=width), rows)
            yield charge.rank, own + 2 * rows * width * matrix.rank
    if owner is not None:
        sections = [(charge.start, charge.stop) for charge in charges]
        height = _height(matrix, sections)
        yield owner, operations(replace(matrix, columns=height), height)


def _undivided(matrix: Matrix, sections: Sequence[tuple[int, int]], by_sums: bool) -> float:
    """Work of the busiest rank if as few ranks as possible share a P."""
    if by_sums:
        return operations(matrix, matrix.columns // len(sections))
    height = _height(matrix, sections)
    return operations(replace(matrix, columns=height), height)


def _number_of_charges(
    layout: Layout, matrix: Matrix, undivided: float, mean: float, most: int
) -> int:
    """One, unless that is more than a rank's mean work; then what brings it down well below.

    Args:
        layout: of all matrices.
        matrix: one of them.
        undivided: work of the busiest rank if as few ranks as possible share its P.
        mean: a rank's work.
        most: the most charges.
    """
    # Sums are of Gram matrices, which `qr` has none of.
    if undivided <= mean or layout.config.orthonormalizer == "qr":
        return 1
    fixed = operations(matrix, 0)
    divisible = operations(matrix, matrix.columns) - fixed
    share = _EVEN_SHARE * mean
    return most if share <= fixed else min(most, math.ceil(divisible / (share - fixed)))


def _add(
    burden: _Burden,
    layout: Layout,
    division: Division,
    k: int,
    sign: int = 1,
) -> None:
    """What a matrix's charges cost those who have them, and who sums for them in tensor groups."""
    data_ranks = _data_ranks(layout, k)
    matrix, size = layout.matrices[k], layout.grid.tensor_parallel_size
    charges, owner = division.charges[k], division.owners.get(k)
    for rank, amount in work(matrix, charges, owner):
        burden.add("operations", rank, sign * amount)
    # Tensor-parallel ranks have different columns of a row-parallel weight, so rows of P come once.
    tiles = 1 if layout.placement(k).weight.partition_dim == 1 else size
    rows_for: Counter[int] = Counter()
    for charge in charges:
        rows = charge.stop - charge.start
        rows_for[charge.rank.tensor_parallel] += rows
        moved, small = rows * matrix.rank * len(data_ranks), 0.0
        if owner is not None:
            small = packed_rows(rows, matrix.rank) * matrix.rank
            burden.add("sent", owner, sign * small)
        elif len(charges) > 1:
            small = _summed_numbers(layout, k)  # there and back
            burden.add("summed", charge.rank, sign * small)
            burden.add("sent", charge.rank, sign * small)
        burden.add("summed", charge.rank, sign * moved)
        burden.add("sent", charge.rank, sign * (moved + small))
    is_at_home = _is_row_parallel(layout, k) and len(charges) % size == 0
    if owner is not None or is_at_home:
        return  # nobody sums within tensor-parallel groups
    for t, rows in rows_for.items():
        moved = rows * matrix.rank * tiles
        sent = moved * (size - 1) // size
        for d in data_ranks:
            burden.add("summed", Rank(t, d), sign * moved)
            burden.add("sent", Rank(t, d), sign * sent)


def cut(matrix: int, rows: int, ranks: Sequence[Rank]) -> tuple[Charge, ...]:
    """Divides rows evenly over ranks, in their order; there must be no more ranks than rows."""
    count = len(ranks)
    return tuple(
        Charge(matrix, rows * i // count, rows * (i + 1) // count, rank)
        for i, rank in enumerate(ranks)
    )
