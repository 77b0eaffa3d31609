"""Which weights are stepped together."""

import math
from collections.abc import Sequence

from megatron_dion.algorithm.step import IN_FLIGHT
from megatron_dion.sharding.layout import Layout

_MIB = 1 << 20


def sets_of(layout: Layout, placements: Sequence[int], ranks: int) -> list[list[int]]:
    """Divides weights into sets whose steps take turns: one computes while another communicates.

    Weights of the same shape alternate, so that every rank has some of each set. There are two
    sets, or as many as keep the buffers of the sets in flight below `exchange_buffer_mib`; with a
    single rank nobody is waited for, and one set is enough. The result, indices of placements set
    by set, is a pure function of shapes and of the number of ranks that communicate.

    Raises:
        ValueError: the limit is too small for some weight.
    """
    in_flight = 1 if ranks == 1 else IN_FLIGHT
    limit = layout.config.exchange_buffer_mib
    if limit is None or not placements:
        return _deal(layout, placements, in_flight)
    capacity = limit * _MIB / in_flight
    needs = {placement: _buffer_bytes(layout, placement) for placement in placements}
    largest = max(needs, key=needs.__getitem__)
    if needs[largest] > capacity:
        least = math.ceil(100 * in_flight * needs[largest] / _MIB) / 100
        raise ValueError(
            f"--dion-exchange-buffer-mib {limit:g} is too small for"
            f" {layout.placements[largest].weight.name}: give at least {least}"
        )
    for count in range(in_flight, len(placements)):
        sets = _deal(layout, placements, count)
        if all(sum(needs[placement] for placement in each) <= capacity for each in sets):
            return sets
    return [[placement] for placement in placements]


def _buffer_bytes(layout: Layout, placement: int) -> int:
    """A bound of the bytes of a weight's buffers on any rank.

    That is P as a rank contributes it, as it is sent, received and summed within the
    tensor-parallel group, and as the owner gets it from all holders; R as it is and as it is sent;
    the gathered columns of Q; and a Gram matrix.
    """
    grid, weight = layout.grid, layout.placements[placement].weight
    shard = layout.placements[placement].bucket_numel // grid.data_parallel_size
    rows = min(weight.rows, shard // weight.columns + 2)
    numbers = 0.0
    for k in layout.matrices_of[placement]:
        matrix = layout.matrices[k]
        copies = (len(layout.holders[k]) + 4) / grid.tensor_parallel_size
        numbers += matrix.rank * ((3 + copies) * matrix.columns + 4 * min(rows, matrix.rows))
        numbers += matrix.rank**2
    return math.ceil(4 * numbers)


def _deal(layout: Layout, placements: Sequence[int], count: int) -> list[list[int]]:
    def shape(placement: int) -> tuple[int, int]:
        weight = layout.placements[placement].weight
        return weight.global_rows, weight.global_columns

    ordered = sorted(placements, key=lambda placement: (shape(placement), placement))
    sets = [sorted(ordered[turn::count]) for turn in range(count)]
    return [each for each in sets if each]
