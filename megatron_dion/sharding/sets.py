"""Which weights are stepped together."""

from collections.abc import Sequence

from megatron_dion.sharding.layout import Layout


def sets_of(layout: Layout, placements: Sequence[int], ranks: int) -> list[list[int]]:
    """Divides weights into sets whose steps take turns: one computes while another communicates.

    Weights of the same shape alternate, so that every rank has some of each set. There are
    `exchange_sets` of them; with a single rank nobody is waited for, and one set is enough. The
    result, indices of placements set by set, is a pure function of shapes and of the number of
    ranks that communicate.
    """

    def key(placement: int) -> tuple[int, int, int]:
        weight = layout.placements[placement].weight
        return weight.global_rows, weight.global_columns, placement

    count = 1 if ranks == 1 else layout.config.exchange_sets
    ordered = sorted(placements, key=key)
    sets = [sorted(ordered[turn::count]) for turn in range(count)]
    return [each for each in sets if each]
