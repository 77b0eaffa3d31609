"""The bytes that a rank sends in a step, by what they are for: read off the plan."""

from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray

from megatron_dion.algorithm import DionConfig, Matrix
from megatron_dion.sharding.collectives import TORCH_DTYPES
from megatron_dion.sharding.layout import Held, Rank
from megatron_dion.sharding.plan import Plan
from megatron_dion.sharding.reduction import Hop, Reduction, Tile


def bytes_sent(plan: Plan, replicas: int = 1) -> dict[str, int]:
    """Bytes that a rank hands to collectives for other ranks in a step of the plan's matrices.

    An all_reduce of N bytes in a group of k counts as 2 N (k - 1) / k and an all_gather of N bytes
    from each rank as N (k - 1), what a ring sends. What is needed only where the usual method of
    orthonormalizing fails is left out.

    Args:
        plan: of the rank.
        replicas: number of replicas over which P and R are averaged.

    Returns:
        Bytes by kind: `left` for P, `rows` for R, `parts` for what P need that several ranks
        orthonormalize, `flags` of those that failed, `right` for what turns R into Q, `gather` of
        its columns, `replicas`. What is sent between data-parallel ranks is told apart by `data `,
        within tensor-parallel groups by `tensor `.
    """
    grid, rank = plan.layout.grid, plan.rank
    wire, kept = element_sizes(plan.layout.config)
    partial = [held for held in plan.held if plan.is_partial(held)]
    size, partial_rows = grid.tensor_parallel_size, numel_of_rows(plan, partial)
    other_rows = numel_of_rows(plan, plan.held) - partial_rows
    to_sum, share = in_shares(partial_rows, size, replicas)
    sums = numel_of_tiles(plan, plan.left.data_hop.sums)
    return {
        "tensor rows": ring_bytes(wire * to_sum, size),
        "data rows": wire * sum(plan.matrices[r.matrix].rank for s in plan.shared_rows for r in s),
        "tensor gather": gathered_numel(plan, partial) * kept,
        "replicas": sum(
            ring_bytes(wire * numbers, replicas) for numbers in (sums, share, other_rows)
        ),
        **_of_group(plan, "tensor", grid.tensor_parallel_size, rank.tensor_parallel),
        **_of_group(plan, "data", grid.data_parallel_size, rank.data_parallel),
    }


def element_sizes(config: DionConfig) -> tuple[int, int]:
    """Bytes of a number of what travels, and of Q."""
    return TORCH_DTYPES[config.comm_dtype].itemsize, TORCH_DTYPES[config.factor_dtype].itemsize


def _of_group(plan: Plan, group: str, ranks: int, me: int) -> dict[str, int]:
    """What is the same for both groups: hops there and back, and the all_reduce of flags."""

    def numel(reductions: Iterable[Reduction]) -> int:
        return sum(_numel_of_hop(plan, getattr(r, f"{group}_hop"), me) for r in reductions)

    wire, _ = element_sizes(plan.layout.config)
    return {
        f"{group} left": wire * numel([plan.left]),
        f"{group} parts": 4 * numel([*plan.part_reductions, plan.merging(plan.merged)]),
        f"{group} right": 8 * numel([plan.right]),
        f"{group} flags": ring_bytes(4 * len(plan.divided), ranks),
    }


def compression_pays(matrices: Sequence[Matrix]) -> bool:
    """Whether P and R of all matrices of a weight are smaller than its gradient."""
    compressed = sum((m.rows + m.columns) * m.rank for m in matrices)
    return compressed < sum(m.rows * m.columns for m in matrices)


def ring_bytes(numel_bytes: int, ranks: int) -> int:
    """What a rank sends in an all_reduce of so many bytes."""
    return 2 * numel_bytes * (ranks - 1) // ranks


def in_shares[Numbers: (int, NDArray[Any])](
    partial_rows: Numbers, ranks: int, replicas: int
) -> tuple[Numbers, Numbers]:
    """Numbers of R that tensor-parallel ranks sum, and what of them each averages over replicas.

    Shares are equal: what is summed is padded to a multiple of the ranks.
    """
    if replicas == 1:
        return partial_rows, 0 * partial_rows
    share = -(-partial_rows // ranks)
    return ranks * share, share


def _numel_of_hop(plan: Plan, hop: Hop, me: int) -> int:
    """There and back, without what stays on the rank."""
    remote = [
        tile
        for peers in (hop.sends, hop.receives)
        for peer, tiles in enumerate(peers)
        if peer != me
        for tile in tiles
    ]
    return numel_of_tiles(plan, remote)


def numel_of_tiles(plan: Plan, tiles: Iterable[Tile]) -> int:
    """Numbers in tiles of P, each (rows, r)."""
    return sum((tile.stop - tile.start) * plan.matrices[tile.matrix].rank for tile in tiles)


def numel_of_rows(plan: Plan, blocks: Iterable[Held]) -> int:
    """Numbers in the rows of R of blocks, each (rows, r)."""
    return sum(held.rectangle.rows * plan.matrices[held.matrix].rank for held in blocks)


def gathered_numel(plan: Plan, partial: Sequence[Held]) -> int:
    """Numbers of Q that this rank sends: to each peer as many as the one with most columns has."""
    ranks = plan.layout.grid.tensor_group(plan.rank)
    sizes = [
        sum(h.rectangle.rows * _kept_columns(plan, h, peer) for h in partial) for peer in ranks
    ]
    return (len(ranks) - 1) * max(sizes)


def _kept_columns(plan: Plan, held: Held, peer: Rank) -> int:
    columns = plan.layout.share(held.placement, plan.matrices[held.matrix].rank, peer)
    return columns.stop - columns.start
