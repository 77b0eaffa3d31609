"""Which weights are stepped together."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_dion.algorithm import IN_FLIGHT
from megatron_dion.sharding.bounds import bound_of_buffers
from megatron_dion.sharding.layout import Placement
from megatron_dion.sharding.plan import Planner

_MIB = 1 << 20


def sets_of(
    planner: Planner, indices: Sequence[int], ranks: int, replicas: int = 1
) -> list[list[int]]:
    """`sets_within` the limit of the planner's hyperparameters, `sets_in_turn` without one."""
    limit = planner.layout.config.exchange_buffer_mib
    if limit is None:
        return sets_in_turn(planner.layout.placements, indices, ranks)
    return sets_within(planner, indices, ranks, limit, replicas)


def sets_in_turn(
    placements: Sequence[Placement], indices: Sequence[int], ranks: int
) -> list[list[int]]:
    """Divides weights into sets whose steps take turns: one computes while another communicates.

    Weights of the same shape alternate, so that every rank has some of each set. With a single
    rank, or without weights, there is nothing to divide.

    Args:
        placements: all weights.
        indices: of those to divide.
        ranks: number of ranks that communicate.
    """
    return _deal(placements, indices, _in_flight(ranks))


def sets_within(
    planner: Planner, indices: Sequence[int], ranks: int, limit_mib: float, replicas: int = 1
) -> list[list[int]]:
    """As `sets_in_turn`, in as few sets as keep the buffers of those in flight below a limit.

    A pure function of shapes and sizes, of which every rank has to fulfil the limit.

    Args:
        planner: of all weights, in any sets.
        indices: of the weights to divide.
        ranks: number of ranks that communicate.
        limit_mib: MiB of exchange buffers of a rank.
        replicas: number of replicas over which P and R are averaged.

    Raises:
        ValueError: the limit is too small for some weight.
    """
    if not indices:
        return []
    in_flight = _in_flight(ranks)
    capacity = limit_mib * _MIB / in_flight
    alone = planner.in_sets([[index] for index in indices])
    needs = {i: bound_of_buffers(alone, k, replicas) for k, i in enumerate(indices)}
    largest = max(indices, key=lambda index: int(needs[index].max()))
    most = int(needs[largest].max())
    if most > capacity:
        least = math.ceil(100 * in_flight * most / _MIB) / 100
        raise ValueError(
            f"--dion-exchange-buffer-mib {limit_mib:g} is too small for"
            f" {planner.layout.placements[largest].weight.name}: give at least {least}"
        )
    count = max(in_flight, math.ceil(_busiest(needs.values()) / capacity))
    while True:
        sets = _deal(planner.layout.placements, indices, count)
        if all(_busiest(needs[index] for index in chosen) <= capacity for chosen in sets):
            return sets
        count += 1


def _busiest(needs: Iterable[Tensor]) -> int:
    """What the rank needs that needs most of all of it."""
    return int(torch.stack(list(needs)).sum(dim=0).max())


def _in_flight(ranks: int) -> int:
    """Where nobody is waited for, a step ends before the next begins."""
    return 1 if ranks == 1 else IN_FLIGHT


def _deal(placements: Sequence[Placement], indices: Sequence[int], count: int) -> list[list[int]]:
    def shape(index: int) -> tuple[int, int]:
        weight = placements[index].weight
        return weight.global_rows, weight.global_columns

    ordered = sorted(indices, key=lambda index: (shape(index), index))
    sets = [sorted(ordered[turn::count]) for turn in range(count)]
    return [chosen for chosen in sets if chosen]
