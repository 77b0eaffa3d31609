"""What every rank of a grid has to do in a step, and how evenly that is spread."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

from megatron_dion.sharding import TORCH_DTYPES, Planner, Rank
from megatron_dion.sharding.balance import operations
from megatron_dion.sharding.reduction import Sum


@dataclass
class Load:
    """One rank's share of a step, except what it does with its own rows.

    Attributes:
        held: elements of weights.
        charges: matrices of whose P it has rows to orthonormalize.
        tensor_sent: bytes that it sends within its tensor-parallel group, for P, what
            orthonormalizing it needs, and Gram matrices of R.
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
    """The load of each rank of the planner's grid, from its lists of sums."""
    grid, config = planner.layout.grid, planner.layout.config
    found = {rank: Load() for rank in grid.ranks()}
    for placement in planner.layout.placements:
        for d in placement.holders(grid.data_parallel_size):
            start, stop = placement.piece(d, grid.data_parallel_size)
            for rank in grid.tensor_group(Rank(0, d)):
                found[rank].held += stop - start
    for index in range(len(planner.sets)):
        _add_sums(
            found, planner, planner.left_sums(index), TORCH_DTYPES[config.comm_dtype].itemsize
        )
        for sums in planner.part_sums(index):
            _add_sums(found, planner, sums, 4)
        _add_sums(found, planner, planner.gram_sums(index), 8)
    for charge in (charge for charges in planner.charges.values() for charge in charges):
        found[charge.rank].charges += 1
        matrix = planner.layout.matrices[charge.matrix]
        found[charge.rank].operations += operations(matrix, charge.stop - charge.start)
    return found


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


def _add_sums(found: dict[Rank, Load], planner: Planner, sums: dict[int, Sum], size: int) -> None:
    for matrix, total in sums.items():
        width = planner.layout.matrices[matrix].rank
        for d in total.by_data_rank:
            _add_near(found, total, d, width, size)
            for index, charge in enumerate(total.charges):
                tile = total.summed_tile(d, index)
                if tile is None:
                    continue
                numel = (tile.stop - tile.start) * width
                found[charge.rank].summed += numel
                near = Rank(charge.rank.tensor_parallel, d)
                if near != charge.rank:
                    found[near].data_sent += size * numel
                    found[charge.rank].data_sent += size * numel


def _add_near(found: dict[Rank, Load], total: Sum, d: int, width: int, size: int) -> None:
    """What happens within a tensor-parallel group; its ranks with the same rows are alike."""
    contributors: dict[tuple[int, int], list[Rank]] = {}
    for rank, rows in total.by_data_rank[d].items():
        contributors.setdefault(rows, []).append(rank)
    for (start, stop), ranks in contributors.items():
        numel_for: Counter[int] = Counter()  # by tensor-parallel rank that sums it
        for charge in total.charges:
            common = min(stop, charge.stop) - max(start, charge.start)
            if common > 0:
                numel_for[charge.rank.tensor_parallel] += common * width
        for t, numel in numel_for.items():
            near = Rank(t, d)
            others = [rank for rank in ranks if rank != near]
            found[near].summed += len(ranks) * numel
            found[near].tensor_sent += size * len(others) * numel
            for rank in others:
                found[rank].tensor_sent += size * numel
