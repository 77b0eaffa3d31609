"""A bound on the exchange buffers of all ranks, without the plan of any.

Arrays (D, T) are indexed by data-parallel and tensor-parallel rank.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from megatron_dion.sharding.balance import Charge
from megatron_dion.sharding.layout import Grid, Rank
from megatron_dion.sharding.memory import peak
from megatron_dion.sharding.plan import Planner
from megatron_dion.sharding.reduction import Sum
from megatron_dion.sharding.traffic import element_sizes

_FLOAT, _DOUBLE = 4, 8


def bound_of_buffers(planner: Planner, index: int, replicas: int = 1) -> Tensor:
    """Bytes that the exchange buffers of no rank exceed in a step of one set.

    Those of several sets put together do not exceed the sum: what they need at a time is at most
    what each needs at its time.

    Args:
        planner: of all ranks.
        index: of the set.
        replicas: number of replicas over which P and R are averaged.

    Returns:
        (D, T) int64.
    """
    wire = element_sizes(planner.layout.config)[0]
    left, divided = planner.left_sums(index), planner.divided(index)
    merged = [k for k in left if k in planner.owners]
    sums = _Sums(planner)
    usual = [phase for phases in planner.part_sums(index).values() for phase in phases]
    kinds = {
        **_of_rows(planner, index, replicas),
        "tiles": sums.tiles(left, _FLOAT),
        "assembled": sums.tiles({k: left[k] for k in divided}, _FLOAT),
        "left": sums.transit(left, _FLOAT, wire)
        + sums.in_charge(left, wire if replicas > 1 else 0),
        "parts": _largest(*(sums.all(s, _FLOAT) for s in (*usual, planner.merging_sums(merged)))),
        "fallback": sums.all(planner.merging_sums(divided), _FLOAT),
        "right": sums.all(planner.right_sums(planner.members(index)), _DOUBLE),
    }
    most: Tensor = peak(kinds, _largest)
    return most


def _largest(*several: Tensor) -> Tensor:
    return reduce(torch.maximum, several)


def _of_rows(planner: Planner, index: int, replicas: int) -> dict[str, Tensor]:
    """Kinds that depend on the rows that a rank holds."""
    layout, grid = planner.layout, planner.layout.grid
    wire, kept = element_sizes(layout.config)
    held = [
        (rank, block, layout.matrices[block.matrix].rank)
        for placement in planner.sets[index]
        for d in layout.placements[placement].holders(grid.data_parallel_size)
        for rank in grid.tensor_group(Rank(0, d))
        for block in layout.held(placement, rank)
    ]
    partial = [item for item in held if layout.shares_rows(item[1].placement)]
    # Shares of Q's columns differ by one at most.
    size = grid.tensor_parallel_size
    gathered = ((r, b.rectangle.rows * -(-width // size)) for r, b, width in partial)
    numel = _place(grid, ((r, b.rectangle.rows * width) for r, b, width in held))
    summed = _place(grid, ((r, b.rectangle.rows * width) for r, b, width in partial))
    other, largest, share = numel - summed, summed, torch.zeros_like(summed)
    if replicas > 1:
        share = (summed + size - 1) // size
        summed = size * share
        largest = torch.maximum(summed, other)
    peers = ((r, width * len(layout.holders_of_cut_row(b, r))) for r, b, width in held)
    return {
        "rows": _FLOAT * (summed + other),
        "gathered": kept * (size + 1) * _place(grid, gathered),
        "rows sent": wire * (share if wire == _FLOAT else share + largest),
        "shared rows": 2 * wire * _place(grid, peers),
    }


class _Sums:
    """Bytes that sums take (D, T).

    Arguments: the sums by matrix; bytes of a number, and of one that is sent.
    """

    def __init__(self, planner: Planner) -> None:
        self._grid = planner.layout.grid
        self._widths = [matrix.rank for matrix in planner.layout.matrices]

    def all(self, sums: Mapping[int, Sum], size: int) -> Tensor:
        return self.tiles(sums, size) + self.transit(sums, size, size)

    def tiles(self, sums: Mapping[int, Sum], size: int) -> Tensor:
        """What ranks contribute."""
        return size * _place(
            self._grid,
            (
                (rank, self._widths[matrix] * (stop - start))
                for matrix, total in sums.items()
                for rank, (start, stop) in total.rows_of.items()
            ),
        )

    def in_charge(self, sums: Mapping[int, Sum], size: int) -> Tensor:
        """What ranks sum in the end."""
        return size * _place(
            self._grid,
            (
                (charge.rank, self._widths[matrix] * (charge.stop - charge.start))
                for matrix, total in sums.items()
                for charge in total.charges
            ),
        )

    def transit(self, sums: Mapping[int, Sum], size: int, wire: int) -> Tensor:
        """What ranks receive and add up, and what they convert before they send it."""
        found = _place(self._grid, ())
        for matrix, total in sums.items():
            found += self._widths[matrix] * self._transit_of(total, size, wire)
        return found

    def _transit_of(self, total: Sum, size: int, wire: int) -> Tensor:
        """For sums of (rows, 1)."""
        converted = 0 if wire == size else wire
        start, stop, tensor, data = _columns_of(total.charges)
        found = _place(self._grid, ())
        for hulls, groups in _alike(total, self._grid.tensor_parallel_size).items():
            low, high = torch.tensor(hulls).T.unsqueeze(-1)  # (T, 1) each
            low, high = torch.maximum(low, start), torch.minimum(high, stop)  # (T, charges)
            tiles = (high - low).clamp_(min=0)
            near = tiles.new_zeros(len(hulls), len(hulls)).index_add_(1, tensor, tiles)
            low = torch.where(tiles > 0, low, stop)
            high = torch.where(tiles > 0, high, start)
            summed = (high.amax(0) - low.amin(0)).clamp_(min=0)  # (charges,)
            near_sums = tiles.new_zeros(len(hulls)).index_add_(0, tensor, summed)
            if len(hulls) > 1:
                own = near.diagonal()
                found[groups] += wire * (near.sum(0) - own) + converted * (near.sum(1) - own)
                found[groups] += size * near_sums
            if len(found) > 1:
                peers = len(groups) - torch.isin(data, torch.tensor(groups)).long()
                found[groups] += converted * near_sums
                found.index_put_((data, tensor), wire * summed * peers, accumulate=True)
        if len(found) > 1:
            # What only its own rank contributes to stays where it is.
            [first, *others] = total.by_data_rank
            summed = (stop - start) * (bool(others) | (data != first))
            found.index_put_((data, tensor), size * summed, accumulate=True)
        return found


def _columns_of(charges: Iterable[Charge]) -> Tensor:
    """First and one past last rows, tensor-parallel and data-parallel ranks (4, charges)."""
    return torch.tensor(
        [(c.start, c.stop, c.rank.tensor_parallel, c.rank.data_parallel) for c in charges]
    ).T


def _alike(total: Sum, size: int) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """Data-parallel ranks whose tensor-parallel groups contribute the same rows."""
    found: defaultdict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for d, rows_of in total.by_data_rank.items():
        found[tuple(rows_of.get(Rank(t, d), (0, 0)) for t in range(size))].append(d)
    return found


def _place(grid: Grid, amounts: Iterable[tuple[Rank, int]]) -> Tensor:
    """Adds up amounts by rank (D, T)."""
    size = grid.tensor_parallel_size
    found = torch.zeros(grid.size, dtype=torch.int64)
    pairs = [(r.data_parallel * size + r.tensor_parallel, amount) for r, amount in amounts]
    if pairs:
        places, values = torch.tensor(pairs).T
        found.index_add_(0, places, values)
    return found.view(grid.data_parallel_size, size)
