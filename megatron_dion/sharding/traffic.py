"""The bytes that a rank sends in a step, by what they are for: read off the plan."""

from collections.abc import Iterable, Iterator

from megatron_dion.sharding.collectives import TORCH_DTYPES
from megatron_dion.sharding.layout import Held, Rank
from megatron_dion.sharding.plan import Plan
from megatron_dion.sharding.reduction import Hop, Reduction, Tile


def bytes_sent(plan: Plan, replicas: int = 1) -> dict[str, int]:
    """Bytes that a rank hands to collectives for other ranks in a step of the plan's matrices.

    An all_reduce of N bytes in a group of k counts as 2 N (k - 1) / k and an all_gather of N bytes
    from each rank as N (k - 1), what a ring sends. What is needed only where a Cholesky
    factorization breaks down is left out.

    Args:
        plan: of the rank.
        replicas: number of replicas over which P and R are averaged.

    Returns:
        Bytes by kind: `left` for P, `rows` for R, `parts` for what divided P need to be
        orthonormalized, `right` for Q, its norms or its Gram matrices, `replicas`. What is sent
        between data-parallel ranks is told apart by `data `, within tensor-parallel groups by
        `tensor `.
    """
    config, grid = plan.layout.config, plan.layout.grid
    wire = TORCH_DTYPES[config.comm_dtype].itemsize
    tensor, data = grid.tensor_parallel_size, grid.data_parallel_size
    partial = [held for held in plan.held if plan.has_partial_rows(held)]
    partial_rows = _numel_of_rows(plan, partial)
    found = {
        "tensor left": _hop_bytes(plan, plan.left.tensor_hop, plan.rank.tensor_parallel, wire),
        "data left": _hop_bytes(plan, plan.left.data_hop, plan.rank.data_parallel, wire),
        "tensor rows": _ring(partial_rows * wire, tensor),
        "data rows": wire * sum(plan.matrices[r.matrix].rank for s in plan.shared_rows for r in s),
        "tensor parts": 0,
        "data parts": 0,
        "tensor right": (tensor - 1)
        * _gathered_numel(plan)
        * TORCH_DTYPES[config.factor_dtype].itemsize,
        "data right": 0,
        "replicas": 0,
    }
    for reduction, size in _small_sums(plan):
        kind = "right" if reduction is plan.grams else "parts"
        found[f"tensor {kind}"] += _hop_bytes(
            plan, reduction.tensor_hop, plan.rank.tensor_parallel, size
        )
        found[f"data {kind}"] += _hop_bytes(plan, reduction.data_hop, plan.rank.data_parallel, size)
    if plan.part_sums:
        flags = 4 * len(plan.divided)
        found["tensor parts"] += _ring(flags, tensor)
        found["data parts"] += _ring(flags, data)
    if plan.grams is None:
        norms = 8 * sum(plan.matrices[k].rank for k in plan.members)
        found["tensor right"] += _ring(norms, tensor)
        found["data right"] += _ring(norms, data)
    if replicas > 1:
        sums = _numel(plan, plan.left.data_hop.sums)
        found["replicas"] = _ring(sums * wire, replicas)
        found["replicas"] += _ring(_numel_of_rows(plan, plan.held) * wire, replicas)
    return found


def _small_sums(plan: Plan) -> Iterator[tuple[Reduction, int]]:
    """Reductions besides that of P, with the bytes of a number."""
    for reduction in plan.part_sums:
        yield reduction, 4
    if plan.grams is not None:
        yield plan.grams, 8


def _hop_bytes(plan: Plan, hop: Hop, me: int, size: int) -> int:
    """There and back, without what stays on the rank."""
    remote = [
        tile
        for peers in (hop.sends, hop.receives)
        for peer, tiles in enumerate(peers)
        if peer != me
        for tile in tiles
    ]
    return size * _numel(plan, remote)


def _numel(plan: Plan, tiles: Iterable[Tile]) -> int:
    return sum((tile.stop - tile.start) * plan.matrices[tile.matrix].rank for tile in tiles)


def _numel_of_rows(plan: Plan, blocks: Iterable[Held]) -> int:
    return sum(held.rectangle.rows * plan.matrices[held.matrix].rank for held in blocks)


def _gathered_numel(plan: Plan) -> int:
    """Numbers of Q that each tensor-parallel rank contributes: as many as the one with most."""
    sizes = [
        sum(
            held.rectangle.rows * _kept_columns(plan, held, peer)
            for held in plan.held
            if plan.has_partial_rows(held)
        )
        for peer in plan.layout.grid.tensor_group(plan.rank)
    ]
    return max(sizes)


def _kept_columns(plan: Plan, held: Held, peer: Rank) -> int:
    columns = plan.layout.share(held.placement, plan.matrices[held.matrix].rank, peer)
    return columns.stop - columns.start


def _ring(numel_bytes: int, ranks: int) -> int:
    return 2 * numel_bytes * (ranks - 1) // ranks
