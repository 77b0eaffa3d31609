"""Dion's part in a step, from the plans by which training itself works."""

from collections import Counter, defaultdict
from typing import Any

import torch

from megatron_dion.algorithm.orthonormalize import GRAM_NUMBERS, orthonormalize_flops
from megatron_dion.algorithm.step import IN_FLIGHT, batch_size
from megatron_dion.sharding.collectives import TORCH_DTYPES, Groups
from megatron_dion.sharding.exchange import ShardedExchange
from megatron_dion.sharding.layout import Grid, Layout, Rank
from megatron_dion.sharding.matrices import compression_pays
from megatron_dion.sharding.plan import Plan, make_plan, sets_of
from megatron_dion_tools.plan.stage import Stage, numel_of, place
from megatron_dion_tools.plan.updates import LAUNCH_NUMBERS, Collective, Update

_PLANNED = 16
"""A grid with no more ranks is planned rank by rank; of a larger one only the busiest ranks are."""

_CALLS = {"tensor": 8, "data": 6, "replicas": 3}
"""About how many collectives a set of weights makes in a step (docs/design.md)."""


def dion(stage: Stage) -> Update:
    """Dion over the distributed optimizer."""
    optimizer, topology = stage.run.optimizer, stage.run.topology
    config, grid = optimizer.dion, Grid(topology.tp, stage.group.size)
    layout = Layout(place(stage.weights, stage.group.size, stage.bucket_size), grid, config)
    replicas = topology.instances if optimizer.compressed_sync else 1
    averaged = [
        index
        for index, indices in enumerate(layout.matrices_of)
        if replicas > 1 and compression_pays([layout.matrices[k] for k in indices])
    ]
    reduced = sorted(set(range(len(layout.placements))) - set(averaged))
    sets = [(each, replicas) for each in sets_of(layout, averaged, grid.size * replicas)]
    sets += [(each, 1) for each in sets_of(layout, reduced, grid.size * replicas)]
    loads = [_load(layout, rank, sets) for rank in busiest_ranks(layout)]
    names = set[str]().union(*loads)
    most = {name: float(max(load[name] for load in loads)) for name in names}
    if replicas > 1:  # gradients of weights for which P and R are no smaller
        dense = sum(numel_of(layout.placements[i].weight) for i in reduced)
        most["replicas"] += 8 * dense / stage.group.size * (replicas - 1) / replicas
    elements = stage.matrices / stage.group.size  # of matrices, on a rank
    along = reduced if config.residual == "rows" else []  # weights that move along the residual
    moved = sum(numel_of(layout.placements[i].weight) for i in along) / stage.group.size
    factors = sum(matrix.rows * matrix.rank for matrix in layout.matrices) / grid.size
    return Update(
        elements,
        {
            "momenta": TORCH_DTYPES[config.momentum_dtype].itemsize * elements,
            "right factors": TORCH_DTYPES[config.factor_dtype].itemsize * factors,
            "exchange": most["exchange"],
            "temporaries": most["temporaries"],
        },
        # The gradient is added to the momentum; of B two reads, and one change. Along
        # the residual, that change is a read for norms, a read and a change of W, and a scaling.
        bytes_passed=54 * elements + 16 * moved,
        products=most["products"],
        float32_products=most["float32 products"],
        factorizations=most["factorizations"],
        launches=most["launches"],
        collectives=[
            Collective(
                "dion",
                topology.group(link),
                most[link],
                calls * len(sets),
                to_peers=link == "data",
            )
            for link, calls in _CALLS.items()
        ],
    )


def busiest_ranks(layout: Layout) -> list[Rank]:
    """The ranks that are planned.

    Of a large grid those that orthonormalize most, those to which others send most, and those that
    contribute to most P; of each tensor-parallel group two, as its ranks are alike up to roundings.
    """
    grid = layout.grid
    if grid.size <= _PLANNED:
        return list(grid.ranks())
    work, received, contributed = Counter[int](), Counter[int](), Counter[int]()
    for placement, indices in enumerate(layout.matrices_of):
        for k in indices:
            matrix, holders = layout.matrices[k], layout.holders[k]
            numbers = matrix.columns * matrix.rank
            work[layout.owners[k]] += numbers * matrix.rank
            received[layout.owners[k]] += numbers * (len(holders) - 1)
            if layout.shares_rows(placement):  # R is summed within the group, and not P
                numbers = 2 * matrix.rows * matrix.rank // len(holders)
            contributed.update(dict.fromkeys(holders, numbers))
    busiest = {rank for each in (work, received, contributed) for rank, _ in each.most_common(2)}
    return [Rank(t, d) for d in sorted(busiest) for t in {0, grid.tensor_parallel_size - 1}]


def _load(layout: Layout, rank: Rank, sets: list[tuple[list[int], int]]) -> Counter[str]:
    """What a rank sends and computes, and the bytes that a step takes beside weights and state."""
    load: Counter[str] = Counter(exchange=0, temporaries=0)
    buffers = []
    for placements, replicas in sets:
        plan = make_plan(layout, rank, placements)
        exchange = ShardedExchange(plan, Groups(), torch.device("meta"), replicas)
        load.update(exchange.bytes_sent())
        buffers.append(exchange.nbytes)
        load["launches"] += round(launches(plan, exchange.has_residual))
        load["temporaries"] = max(load["temporaries"], exchange.temporary_bytes)
        for _, rectangle in plan.rectangles:
            products = 6 if exchange.has_residual else 8  # three, or four, with m n r each
            load["products"] += products * rectangle.numel * layout.matrices[rectangle.matrix].rank
        for tile in plan.owner_hop.sums:
            r = layout.matrices[tile.matrix].rank
            load["factorizations"] += orthonormalize_flops(0, r)
            load["float32 products"] += orthonormalize_flops(tile.stop - tile.start, r)
            load["float32 products"] -= orthonormalize_flops(0, r)
    load["exchange"] = sum(sorted(buffers)[-IN_FLIGHT:])
    return load


def launches(plan: Plan, has_residual: bool) -> float:
    """About how many kernels the step of a plan starts, by what a count finds of each kind."""
    config, matrices = plan.layout.config, plan.layout.matrices
    pieces = Counter((p, rectangle.matrix) for p, rectangle in plan.rectangles)
    blocks: Counter[tuple[Any, ...]] = Counter()  # numbers of R, by what is computed together
    for p, each in plan.rectangles:
        # The rectangles of a matrix are one block, and so are equal matrices of a weight.
        matrix = each.matrix if pieces[p, each.matrix] > 1 else None
        rank = matrices[each.matrix].rank
        blocks[p, matrix, each.rows, each.columns, rank] += each.rows * rank
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for (_, matrix, *shape), numbers in blocks.items():
        alike[matrix is None, *shape].append(numbers)
    batches = sum(-(-len(n) // batch_size(len(n), max(n))) for n in alike.values())
    is_shared = plan.layout.grid.tensor_parallel_size > 1
    rounded = (config.momentum_dtype, config.factor_dtype, config.comm_dtype)
    of_block = 2 + is_shared + sum(dtype != "fp32" for dtype in rounded)
    passes = sum(rectangle.numel for _, rectangle in plan.rectangles) / LAUNCH_NUMBERS
    if blocks:
        passes += 12 + 9 * batches + has_residual * (15 + 4 * batches)
    by_rank, by_shape = Counter[int](), Counter[tuple[int, int]]()
    for tile in plan.owner_hop.sums:
        r = matrices[tile.matrix].rank
        by_rank[r] += 1
        by_shape[tile.stop - tile.start, r] += 1
    orthonormalizing = 10 + 35 * sum(-(-n * r**2 // GRAM_NUMBERS) for r, n in by_rank.items())
    for (rows, r), n in by_shape.items():
        calls = -(-n * r * max(r, rows // 2) // GRAM_NUMBERS)  # P of one has up to twice as many
        orthonormalizing += calls * (3 + 4 * min(4, -(-r // 256)))
    return passes + len(blocks) * of_block + orthonormalizing
