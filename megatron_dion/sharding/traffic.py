"""The bytes that a rank sends in a step, read off its plan."""

from collections.abc import Iterable, Sequence

from megatron_dion.algorithm import DionConfig, Matrix
from megatron_dion.sharding.collectives import TORCH_DTYPES
from megatron_dion.sharding.layout import Rank
from megatron_dion.sharding.plan import Hop, Plan, Tile


def bytes_sent(plan: Plan, replicas: int = 1) -> dict[str, int]:
    """Bytes that a rank hands to collectives for other ranks in a step of the plan's matrices.

    An all_reduce of N bytes in a group of k counts as 2 N (k - 1) / k, and an all_gather of N bytes
    from each rank as N (k - 1): what a ring sends.

    Args:
        plan: of the rank.
        replicas: number of replicas over which P and R are averaged.

    Returns:
        Bytes by group: `tensor`, `data` and `replicas`.
    """
    layout, rank = plan.layout, plan.rank
    tensor, data = layout.grid.tensor_parallel_size, layout.grid.data_parallel_size
    ranks = [matrix.rank for matrix in layout.matrices]
    wire, stored = element_sizes(layout.config)
    numbers = 8 * sum(ranks[k] for k in plan.members)
    owned = [tile for tiles in plan.data_hop.receives for tile in tiles]
    owned_ranks = [ranks[k] for k in {tile.matrix for tile in owned}]
    # Of the orthonormalization: the largest entries of columns, and two Gram matrices.
    orthonormalized = 4 * sum(r + 2 * r * r for r in owned_ranks)
    partial = [
        (placement, rectangle)
        for placement, rectangle in plan.rectangles
        if layout.shares_rows(placement)
    ]
    partial_rows = sum(rectangle.rows * ranks[rectangle.matrix] for _, rectangle in partial)
    other_rows = (
        sum(rectangle.rows * ranks[rectangle.matrix] for _, rectangle in plan.rectangles)
        - partial_rows
    )
    stored_columns = max(
        sum(rectangle.rows * _share(plan, p, rectangle.matrix, peer) for p, rectangle in partial)
        for peer in layout.grid.tensor_group(rank.data_parallel)
    )
    if replicas > 1:
        partial_rows += -partial_rows % tensor
    cut_rows = sum(ranks[row.matrix] for rows in plan.cut_rows for row in rows)
    averaged = _numel(plan.data_hop.sums, ranks) + partial_rows // tensor + other_rows
    return {
        "tensor": wire * _numel_of_hop(plan.tensor_hop, rank.tensor_parallel, ranks)
        + ring_bytes(wire * partial_rows + orthonormalized + numbers, tensor)
        + (tensor - 1) * stored * stored_columns,
        "data": wire * (_numel_of_hop(plan.data_hop, rank.data_parallel, ranks) + cut_rows)
        + ring_bytes(numbers, data),
        "replicas": ring_bytes(wire * averaged, replicas),
    }


def element_sizes(config: DionConfig) -> tuple[int, int]:
    """Bytes of a number of P and R as they travel, and of Q as it is stored."""
    return TORCH_DTYPES[config.comm_dtype].itemsize, TORCH_DTYPES[config.factor_dtype].itemsize


def compression_pays(matrices: Sequence[Matrix]) -> bool:
    """Whether P and R of all matrices of a weight are smaller than its gradient."""
    compressed = sum((m.rows + m.columns) * m.rank for m in matrices)
    return compressed < sum(m.rows * m.columns for m in matrices)


def ring_bytes(nbytes: int, ranks: int) -> int:
    """What a rank sends in an all_reduce of so many bytes."""
    return 2 * nbytes * (ranks - 1) // ranks


def _share(plan: Plan, placement: int, matrix: int, peer: Rank) -> int:
    """How many columns of Q a tensor-parallel rank stores."""
    columns = plan.layout.share(placement, plan.layout.matrices[matrix].rank, peer)
    return columns.stop - columns.start


def _numel_of_hop(hop: Hop, me: int, ranks: Sequence[int]) -> int:
    """There and back, without what stays on the rank."""
    return sum(
        _numel(tiles, ranks)
        for peers in (hop.sends, hop.receives)
        for peer, tiles in enumerate(peers)
        if peer != me
    )


def _numel(tiles: Iterable[Tile], ranks: Sequence[int]) -> int:
    return sum((tile.stop - tile.start) * ranks[tile.matrix] for tile in tiles)
