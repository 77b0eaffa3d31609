"""What every rank of a grid has to do in a step, and how evenly that is spread."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from megatron_dion.algorithm.orthonormalize import summed_rows
from megatron_dion.sharding import TORCH_DTYPES, Planner, Rank
from megatron_dion.sharding.balance import work
from megatron_dion_tools.plan.holdings import holdings
from megatron_dion_tools.plan.hops import Charges, Hops


@dataclass
class Load:
    """One rank's share of a step, except what it does with its own rows.

    Attributes:
        held: elements of weights.
        charges: matrices of whose P it has rows to orthonormalize.
        tensor_sent: bytes that it sends within its tensor-parallel group, for P, what
            orthonormalizing it needs, and what turns R into Q.
        data_sent: the same between data-parallel ranks.
        summed: numbers that it adds up.
        operations: floating-point operations of its orthonormalizations.
    """

    held: int = 0
    charges: int = 0
    tensor_sent: int = 0
    data_sent: int = 0
    summed: int = 0
    operations: float = 0.0

    @property
    def sent(self) -> int:
        return self.tensor_sent + self.data_sent


def loads(planner: Planner) -> dict[Rank, Load]:
    """The load of each rank of the planner's grid."""
    grid, matrices = planner.layout.grid, planner.layout.matrices
    left, parts, right = count_hops(planner)
    wire = TORCH_DTYPES[planner.layout.config.comm_dtype].itemsize
    shape = grid.data_parallel_size, grid.tensor_parallel_size
    held = np.zeros(shape, np.int64)
    for holding in holdings(planner.layout):
        held += holding.elements
    charges: Counter[Rank] = Counter()
    operations: Counter[Rank] = Counter()
    for k, found_charges in planner.charges.items():
        charges.update(charge.rank for charge in found_charges)
        for rank, amount in work(matrices[k], found_charges, planner.owners.get(k)):
            operations[rank] += amount  # type: ignore[assignment]

    def sent(kind: str, rank: Rank) -> int:
        return int(
            sum(
                size * getattr(hops, kind)[rank.data_parallel, rank.tensor_parallel]
                for hops, size in ((left, wire), (parts, 4), (right, 8))
            )
        )

    found = {}
    for rank in grid.ranks():
        place = rank.data_parallel, rank.tensor_parallel
        found[rank] = Load(
            held=int(held[place]),
            charges=charges[rank],
            tensor_sent=sent("tensor", rank),
            data_sent=sent("data", rank),
            summed=int(left.added[place] + parts.added[place] + right.added[place]),
            operations=operations[rank],
        )
    return found


def count_hops(
    planner: Planner, matrices: Sequence[int] | None = None, data_ranks_per_node: int = 1
) -> tuple[Hops, Hops, Hops]:
    """What sums of P, of what divided P need, and of what turns R into Q move.

    Args:
        planner: of the ranks.
        matrices: whose sums; of all by default.
        data_ranks_per_node: data-parallel ranks of a group that share a node.
    """
    layout, config = planner.layout, planner.layout.config
    left, parts, right = (Hops(layout.grid, data_ranks_per_node) for _ in range(3))
    for k in range(len(layout.matrices)) if matrices is None else matrices:
        holders, width = layout.columns_of_holders[k], layout.matrices[k].rank
        charges = Charges.of(planner.charges[k])
        left.add(holders, charges, width)
        if k in planner.owners:
            [triangles] = planner.merging_sums([k]).values()
            parts.add(triangles.rows_of, Charges.of(triangles.charges), width)
        elif len(planner.charges[k]) > 1:
            those = [charge.rank for charge in planner.charges[k]]
            for rows in summed_rows(layout.part_method(k), width, config.oversample):
                parts.add(dict.fromkeys(those, (0, rows)), charges.of_rows(rows), width)
        for total in planner.right_sums([k]).values():
            right.add(total.rows_of, Charges.of(total.charges), width)
    return left, parts, right


def busiest_to_mean(found: Iterable[Load], name: str) -> float:
    """The largest of all ranks' figures as a multiple of their mean; 1 where all are zero."""
    figures = [getattr(load, name) for load in found]
    mean = sum(figures) / len(figures)
    return max(figures) / mean if mean else 1.0


def describe(found: dict[Rank, Load], most: int = 16) -> str:
    """A table of the loads, of the first ranks, and of the mean and the busiest of all."""
    ranks = list(found.items())
    rows = [
        (f"tp {rank.tensor_parallel} dp {rank.data_parallel}", load) for rank, load in ranks[:most]
    ]
    names = [field.name for field in fields(Load)]
    lines = ["  ".join(["rank".ljust(16), *(_heading(name) for name in names)])]
    lines += [
        "  ".join([label.ljust(16), *(_figure(getattr(load, name)) for name in names)])
        for label, load in rows
    ]
    if len(ranks) > most:
        lines.append(f"... {len(ranks) - most} more ranks")
    every = list(found.values())
    mean = [sum(getattr(load, name) for load in every) / len(every) for name in names]
    lines.append("  ".join(["mean".ljust(16), *(_figure(value) for value in mean)]))
    ratios = [busiest_to_mean(every, name) for name in names]
    lines.append("  ".join(["busiest / mean".ljust(16), *(f"{ratio:>11.2f}" for ratio in ratios)]))
    return "\n".join(lines)


def _heading(name: str) -> str:
    return f"{name.replace('_', ' '):>11}"


def _figure(value: float) -> str:
    return f"{value:>11.4g}"
