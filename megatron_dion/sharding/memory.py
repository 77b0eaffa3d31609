"""The bytes of the buffers of an exchange: read off the plan."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_dion.sharding.plan import Plan
from megatron_dion.sharding.reduction import Hop, Reduction, Tile
from megatron_dion.sharding.traffic import (
    element_sizes,
    gathered_numel,
    in_shares,
    numel_of_rows,
    numel_of_tiles,
)

_FLOAT, _DOUBLE = 4, 8

# Buffers with memory for the whole step of a set.
_KEPT = ("rows", "tiles", "assembled")


def buffer_bytes(plan: Plan, replicas: int = 1) -> dict[str, int]:
    """Bytes of a rank's buffers for a step of the plan's matrices, when they have memory.

    Args:
        plan: of the rank.
        replicas: number of replicas over which P and R are averaged.

    Returns:
        Bytes by kind. For the whole step: `rows` of R; `tiles` of P, as they are sent;
        `assembled` P of which several tiles are sent. For a part of it: `gathered` columns of Q;
        `left`, what is received and summed of P; `parts`, the most that orthonormalizing P together
        usually needs at a time, and `fallback`, where the usual method fails for all that are done
        by sums; `rows sent`, the share of R to average over replicas, and copies in the exchange's
        type; `shared rows` of R; `right`, for what turns R into Q.
    """
    grid = plan.layout.grid
    wire, kept = element_sizes(plan.layout.config)
    partial = [held for held in plan.held if plan.is_partial(held)]
    tiles, left = _of_reduction(plan, plan.left, _FLOAT, wire)
    averaged = numel_of_tiles(plan, plan.left.data_hop.sums) if replicas > 1 else 0
    size = grid.tensor_parallel_size
    partial_rows = numel_of_rows(plan, partial)
    other_rows = numel_of_rows(plan, plan.held) - partial_rows
    partial_rows, share = in_shares(partial_rows, size, replicas)
    largest = max(partial_rows, other_rows) if replicas > 1 else partial_rows
    shared = sum(plan.matrices[row.matrix].rank for rows in plan.shared_rows for row in rows)
    assembled = sum(
        (stop - start) * plan.matrices[k].rank for k, (start, stop) in plan.assembled.items()
    )
    sent = gathered_numel(plan, partial) // max(grid.tensor_parallel_size - 1, 1)
    return {
        "rows": _FLOAT * (partial_rows + other_rows),
        "tiles": tiles,
        "assembled": _FLOAT * assembled,
        "gathered": kept * sent * (grid.tensor_parallel_size + 1),
        "left": left + wire * averaged,
        "parts": max(
            sum(_of_reduction(plan, part, _FLOAT, _FLOAT))
            for part in (*plan.part_reductions, plan.merging(plan.merged))
        ),
        "fallback": sum(_of_reduction(plan, plan.merging(plan.divided), _FLOAT, _FLOAT)),
        "rows sent": wire * (share + (0 if wire == _FLOAT else largest)),
        "shared rows": 2 * wire * shared,
        "right": sum(_of_reduction(plan, plan.right, _DOUBLE, _DOUBLE)),
    }


def peak_bytes(plan: Plan, replicas: int = 1) -> int:
    """The most bytes that a rank's buffers have at any time in a step of the plan's matrices."""
    most: int = peak(buffer_bytes(plan, replicas))
    return most


def peak(kinds: Mapping[str, Any], largest: Callable[..., Any] = max) -> Any:
    """The most bytes at any time: some buffers have memory in a part of a step only.

    Args:
        kinds: as `buffer_bytes` returns them; or tensors of such numbers.
        largest: of some of them.
    """
    return sum(kinds[kind] for kind in _KEPT) + largest(
        kinds["gathered"],
        kinds["left"] + largest(kinds["parts"], kinds["fallback"]),
        kinds["rows sent"],
        kinds["shared rows"],
        kinds["right"],
    )


def _of_reduction(plan: Plan, reduction: Reduction, size: int, wire: int) -> tuple[int, int]:
    """Bytes of the tiles, and of all that is received, summed or converted."""
    near, far = reduction.tensor_hop, reduction.data_hop
    rank = plan.rank
    tiles = size * _numel(plan, near.sends)
    transit = 0
    if not near.is_silent:
        transit += _of_hop(plan, near, rank.tensor_parallel, size, wire)
        transit += size * _numel(plan, far.sends)
    if not far.is_silent:
        transit += _of_hop(plan, far, rank.data_parallel, size, wire)
        transit += size * numel_of_tiles(plan, _summed(far, rank.data_parallel))
    return tiles, transit


def _of_hop(plan: Plan, hop: Hop, me: int, size: int, wire: int) -> int:
    """What is received, and what is sent where it has another type in transit."""
    others = [peer for peer in range(len(hop.sends)) if peer != me]
    received = _numel(plan, [hop.receives[peer] for peer in others])
    sent = _numel(plan, [hop.sends[peer] for peer in others])
    return wire * (received + (sent if wire != size else 0))


def _summed(hop: Hop, me: int) -> list[Tile]:
    """The sums, without those to which only this rank contributes: they stay where they are."""
    arriving = {tile.key for peer, tiles in enumerate(hop.receives) if peer != me for tile in tiles}
    own = {tile.key for tile in hop.receives[me]}
    return [tile for tile in hop.sums if tile.key in arriving or tile.key not in own]


def _numel(plan: Plan, peers: Sequence[Sequence[Tile]]) -> int:
    return numel_of_tiles(plan, [tile for tiles in peers for tile in tiles])
