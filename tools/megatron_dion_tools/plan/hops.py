"""What the sums of a step move, for all ranks of a grid at once.

The same figures as adding up the tiles of every rank's plan, without making the plans: of the ranks
that contribute to a sum, tensor-parallel groups that contribute the same rows are counted together.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_dion.sharding import Grid, Rank
from megatron_dion.sharding.balance import Charge
from megatron_dion_tools.plan.holdings import Counts

Ranges = tuple[tuple[int, int], ...]
"""The rows that each rank of a tensor-parallel group contributes."""


@dataclass(frozen=True)
class Charges:
    """Who sums which rows of something; each array has one entry for each charge."""

    start: Counts
    stop: Counts
    tensor: Counts
    data: Counts

    @classmethod
    def of(cls, charges: Iterable[Charge]) -> "Charges":
        rows = [(c.start, c.stop, c.rank.tensor_parallel, c.rank.data_parallel) for c in charges]
        return cls(*np.array(rows, np.int64).T)

    def of_rows(self, rows: int) -> "Charges":
        """The same ranks in charge of even shares of other rows, as `sum_for_all` divides them."""
        count = min(rows, len(self.start))
        bounds = rows * np.arange(count + 1, dtype=np.int64) // count
        return Charges(bounds[:-1], bounds[1:], self.tensor[:count], self.data[:count])


class Hops:
    """Numbers that ranks move in sums, each (D, T): [data-parallel rank, tensor-parallel rank].

    Args:
        grid: the ranks.
        data_ranks_per_node: data-parallel ranks of a group that share a node.

    Attributes:
        tensor: sent within tensor-parallel groups, there and back.
        data: sent between data-parallel ranks, there and back.
        data_in_node: those of `data` that stay on a node.
        added: numbers that are added up.
        charged: numbers of the sums that a rank is in charge of.
    """

    def __init__(self, grid: Grid, data_ranks_per_node: int = 1) -> None:
        shape = grid.data_parallel_size, grid.tensor_parallel_size
        self.tensor, self.data, self.data_in_node, self.added, self.charged = (
            np.zeros(shape, np.int64) for _ in range(5)
        )
        self._node = np.arange(grid.data_parallel_size) // data_ranks_per_node

    def add(self, rows_of: Mapping[Rank, tuple[int, int]], charges: Charges, width: int) -> None:
        """A sum of (rows, width).

        Args:
            rows_of: for each rank that contributes the hull of its rows.
            charges: who sums which rows.
            width: numbers of a row.
        """
        np.add.at(
            self.charged,
            (charges.data, charges.tensor),
            width * (charges.stop - charges.start),
        )
        for ranges, members in self._alike(rows_of).items():
            self._add_groups(ranges, np.array(members), charges, width)

    def _alike(self, rows_of: Mapping[Rank, tuple[int, int]]) -> dict[Ranges, list[int]]:
        """Data-parallel ranks whose tensor-parallel groups contribute the same rows."""
        size = self.tensor.shape[1]
        groups: dict[int, list[tuple[int, int]]] = {}
        for rank, rows in rows_of.items():
            group = groups.setdefault(rank.data_parallel, [(0, 0)] * size)
            group[rank.tensor_parallel] = rows
        found: dict[Ranges, list[int]] = {}
        for data_rank, ranges in groups.items():
            found.setdefault(tuple(ranges), []).append(data_rank)
        return found

    def _add_groups(self, ranges: Ranges, groups: Counts, charges: Charges, width: int) -> None:
        starts, stops = np.array(ranges, np.int64).T[:, :, None]  # (T, 1) each
        starts, stops = np.maximum(starts, charges.start), np.minimum(stops, charges.stop)
        tiles = width * np.maximum(stops - starts, 0)  # (T, charges)
        # near[t, u] goes from t to u, who sums it for the charges of tensor-parallel rank u.
        near = _by_tensor_rank(tiles, charges, len(ranges))  # (T, T)
        both_ways = near.sum(axis=0) + near.sum(axis=1) - 2 * near.diagonal()
        self.tensor[groups] += both_ways
        self.added[groups] += near.sum(axis=0)
        there = tiles > 0
        low = np.where(there, starts, np.iinfo(np.int64).max).min(axis=0)
        high = np.where(there, stops, 0).max(axis=0)
        summed = width * np.where(there.any(axis=0), high - low, 0)  # (charges,)
        self._add_far(summed, groups, charges)

    def _add_far(self, summed: Counts, groups: Counts, charges: Charges) -> None:
        """Each group sends `summed` to the charges' ranks; what is a rank's own stays."""
        where = charges.data, charges.tensor
        np.add.at(self.added, where, len(groups) * summed)
        own = np.isin(charges.data, groups)
        self.data[groups] += _by_tensor_rank(summed[None], charges, self.data.shape[1])
        np.add.at(self.data, where, (len(groups) - 2 * own) * summed)
        on_node = np.bincount(self._node[groups], minlength=self._node[-1] + 1)
        to_node = np.zeros((len(on_node), self.data.shape[1]), np.int64)
        np.add.at(to_node, (self._node[charges.data], charges.tensor), summed)
        self.data_in_node[groups] += to_node[self._node[groups]]
        np.add.at(self.data_in_node, where, (on_node[self._node[charges.data]] - 2 * own) * summed)


def _by_tensor_rank(numbers: Counts, charges: Charges, size: int) -> Counts:
    """Sums (n, charges) over the charges of each tensor-parallel rank: (n, T)."""
    found = np.zeros((len(numbers), size), np.int64)
    np.add.at(found.T, charges.tensor, numbers.T)
    return found
