"""The least that a step must send, over all ranks of a grid: docs/traffic.md derives it."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_dion.algorithm import Matrix
from megatron_dion.sharding.balance import Charges
from megatron_dion.sharding.blocks import Rectangle
from megatron_dion.sharding.collectives import TORCH_DTYPES
from megatron_dion.sharding.layout import Layout, Rank

_Holders = Sequence[Sequence[Rectangle]]
"""For each holder of a matrix its blocks."""

_NORM_BYTES, _TRIANGLE_BYTES = 8, 4


@dataclass(frozen=True)
class _Span:
    """Consecutive columns of which a holder has `height` rows each, or rows and columns."""

    start: int
    stop: int
    height: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def least_bytes_of_factors(layout: Layout) -> dict[str, int]:
    """What must be sent where momenta stay with their weights and products are made there.

    Of h ranks that add to a row of P, h - 1 must send their part and h - 1 receive the sum; the
    same for a row of R and for column norms. Rows of P that no rank has all of must be made
    orthonormal to each other: what counts of some of them is their triangle. A right factor is
    stored once, so tensor-parallel ranks with the same rows bring its columns together. Weights
    that tensor-parallel ranks duplicate could be stepped by each of them: they count as the weights
    of one.

    Args:
        layout: of all weights; for the right factor `colnorm`.

    Returns:
        Bytes that all ranks together send, by the kinds of `traffic.bytes_sent`.
    """
    config = layout.config
    wire = TORCH_DTYPES[config.comm_dtype].itemsize
    found = dict.fromkeys(
        ("tensor left", "data left", "tensor rows", "data rows", "tensor right", "data right"), 0
    )
    for matrix, by_rank in zip(layout.matrices, _blocks(layout), strict=True):
        ranks, groups = list(by_rank.values()), _by_data_rank(by_rank)
        for kind, count, size in (
            ("left", _left_numel, wire),
            ("rows", _rows_numel, wire),
            ("right", _norms_numel, _NORM_BYTES),
        ):
            every, far = (2 * size * count(matrix, holders) for holders in (ranks, groups))
            found[f"tensor {kind}"] += every - far
            found[f"data {kind}"] += far
    return found | {"tensor gather": _gathered_numel(layout) * _factor_bytes(layout)}


def least_bytes_of_sharing(layout: Layout, charges: Charges) -> dict[str, int]:
    """What must be sent besides where several ranks orthonormalize a P, some of its rows each.

    All of them but one must say how their rows lie to each other, and be told how all do: their
    triangle each way. Within a tensor-parallel group that is counted already where nobody has all
    rows of P.

    Args:
        layout: of all weights.
        charges: for each matrix who orthonormalizes which rows.

    Returns:
        Bytes that all ranks together send, by the kinds of `traffic.bytes_sent`.
    """
    near = far = 0
    for k, found in charges.items():
        matrix, size = layout.matrices[k], layout.grid.tensor_parallel_size
        rows: Counter[int] = Counter()
        for charge in found:
            rows[charge.rank.data_parallel] += charge.stop - charge.start
        every = _all_but_largest(_triangle(matrix, c.stop - c.start) for c in found)
        of_groups = _all_but_largest(_triangle(matrix, count) for count in rows.values())
        is_cut = layout.placement(k).weight.partition_dim == 1
        counted = (size - 1) * _triangle(matrix, matrix.columns // size) if is_cut else 0
        far += of_groups
        near += max(every - of_groups - counted, 0)
    return {"tensor parts": 2 * _TRIANGLE_BYTES * near, "data parts": 2 * _TRIANGLE_BYTES * far}


def _all_but_largest(numbers: Iterable[int]) -> int:
    *others, _ = sorted(numbers)
    return sum(others)


def least_bytes_of_any_schedule(layout: Layout) -> tuple[int, int]:
    """What must be sent wherever momenta are, if gradients and weights are where Megatron has them.

    A holder of less than r rows may send them, and receive their update, in place of its parts of
    P; one of less than r columns, in place of its parts of R. Column norms are left out.

    Returns:
        Bytes that all ranks together send, and those of them between data-parallel ranks.
    """
    wire = TORCH_DTYPES[layout.config.comm_dtype].itemsize
    every = far = 0
    for matrix, by_rank in zip(layout.matrices, _blocks(layout), strict=True):
        every += 2 * wire * _least_numel(matrix, list(by_rank.values()))
        far += 2 * wire * _least_numel(matrix, _by_data_rank(by_rank))
    return every, far


def _blocks(layout: Layout) -> list[dict[Rank, list[Rectangle]]]:
    """For each matrix and holder the blocks, copies left out."""
    found: list[dict[Rank, list[Rectangle]]] = [{} for _ in layout.matrices]
    for index, placement in enumerate(layout.placements):
        for d in placement.holders(layout.grid.data_parallel_size):
            group = layout.grid.tensor_group(Rank(0, d))
            for rank in group[:1] if layout.is_duplicated(index) else group:
                for held in layout.held(index, rank):
                    found[held.matrix].setdefault(rank, []).append(held.rectangle)
    return found


def _by_data_rank(by_rank: dict[Rank, list[Rectangle]]) -> list[list[Rectangle]]:
    """A tensor-parallel group as one holder."""
    groups: dict[int, list[Rectangle]] = {}
    for rank, blocks in by_rank.items():
        groups.setdefault(rank.data_parallel, []).extend(blocks)
    return list(groups.values())


def _gathered_numel(layout: Layout) -> int:
    """Of each row of Q, what one tensor-parallel rank keeps goes to the others."""
    others = layout.grid.tensor_parallel_size - 1
    return sum(
        others * held.rectangle.rows * layout.matrices[held.matrix].rank
        for index in range(len(layout.placements))
        if layout.shares_rows(index) and not layout.is_duplicated(index)
        for d in layout.placements[index].holders(layout.grid.data_parallel_size)
        for held in layout.held(index, Rank(0, d))
    )


def _factor_bytes(layout: Layout) -> int:
    return TORCH_DTYPES[layout.config.factor_dtype].itemsize


def _columns(blocks: Iterable[Rectangle]) -> list[_Span]:
    return _profile((block.column_start, block.column_stop, block.rows) for block in blocks)


def _rows(blocks: Iterable[Rectangle]) -> list[_Span]:
    return _profile((block.row_start, block.row_stop, block.columns) for block in blocks)


def _profile(layers: Iterable[tuple[int, int, int]]) -> list[_Span]:
    """Heights of layers (start, stop, height) put on each other, where there are any."""
    steps: dict[int, int] = {}
    for start, stop, height in layers:
        steps[start] = steps.get(start, 0) + height
        steps[stop] = steps.get(stop, 0) - height
    edges = sorted(steps)
    heights = accumulate(steps[edge] for edge in edges)
    return [
        _Span(*between, height)
        for between, height in zip(pairwise(edges), heights, strict=False)
        if height
    ]


def _left_numel(matrix: Matrix, holders: _Holders) -> int:
    """What must leave the holders so that sums of rows of P are known, and orthonormal."""
    surplus = _area(holders, _columns, most=1)
    widest = max(sum(span.length for span in _columns(blocks)) for blocks in holders)
    # What no single holder has of P: of those rows the triangles come too. Least of all where
    # others have as many rows each as one can have.
    others, rest = divmod(matrix.columns - widest, widest)
    triangles = others * _triangle(matrix, widest) + _triangle(matrix, rest)
    return surplus * matrix.rank + triangles


def _triangle(matrix: Matrix, rows: int) -> int:
    """Numbers that say how so many rows of P lie to each other: an upper trapezoid (k, r)."""
    height = min(rows, matrix.rank)
    return height * (2 * matrix.rank - height + 1) // 2


def _rows_numel(matrix: Matrix, holders: _Holders) -> int:
    return _area(holders, _rows, most=1) * matrix.rank


def _norms_numel(matrix: Matrix, holders: _Holders) -> int:
    return (len(holders) - 1) * matrix.rank


def _least_numel(matrix: Matrix, holders: _Holders) -> int:
    """What must leave the holders, and come back as much."""
    left = _area(holders, _columns, matrix.rank)
    rows = _area(holders, _rows, matrix.rank)
    together = all(_is_thick(blocks, matrix.rank) for blocks in holders)
    return left + rows if together else max(left, rows)


def _area(
    holders: _Holders, profile: Callable[[Iterable[Rectangle]], list[_Span]], most: int
) -> int:
    """Sum of all holders' heights, none above `most`, without the highest at each place."""
    spans = [
        _Span(span.start, span.stop, min(span.height, most))
        for blocks in holders
        for span in profile(blocks)
    ]
    return sum(span.length * span.height for span in spans) - _area_of_highest(spans)


def _area_of_highest(spans: Sequence[_Span]) -> int:
    """The area under the highest span at each place."""
    area, here = 0, 0
    highest: list[tuple[int, int]] = []  # minus height and end of the spans that have begun
    for span in sorted(spans, key=lambda span: span.start):
        area += _advance(highest, here, span.start)
        here = span.start
        heapq.heappush(highest, (-span.height, span.stop))
    return area + _advance(highest, here, max((span.stop for span in spans), default=here))


def _advance(highest: list[tuple[int, int]], here: int, there: int) -> int:
    """The area between two places; forgets the spans that have ended."""
    area = 0
    while highest and here < there:
        height, stop = highest[0]
        if stop <= here:
            heapq.heappop(highest)
            continue
        area += -height * (min(stop, there) - here)
        here = min(stop, there)
    return area


def _is_thick(blocks: Sequence[Rectangle], rank: int) -> bool:
    """Whether a holder sends less by sums, for P and R both, than by moving any of its elements."""
    columns, rows = _columns(blocks), _rows(blocks)
    sums = sum(span.length * min(span.height, rank) for span in (*columns, *rows))
    return min(span.height for span in columns) >= rank and sums <= sum(b.numel for b in blocks)
