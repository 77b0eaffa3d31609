"""What the planner counts for all ranks at once is what each rank's own plan says."""

import numpy as np
from hypothesis import example, given

from megatron_dion import DionConfig
from megatron_dion.sharding import Grid, Plan, Rank, Weight
from megatron_dion.sharding.traffic import bytes_sent
from megatron_dion_tools.plan.memory import dion_state
from megatron_dion_tools.plan.stage import DionPart
from megatron_dion_tools.plan.topology import Group
from megatron_dion_tools.plan.traffic import calls_of, set_bytes
from tests.unit.test_plan import Layout, for_any_layout, in_one_bucket, layouts

REPLICAS = 3
PER_NODE = 2


def part_of(layout: Layout) -> DionPart:
    group = Group(layout.grid.data_parallel_size, 4, 4 * PER_NODE)
    return DionPart(layout.planner, False, group, (REPLICAS,) * len(layout.sets))


@given(layouts())
@for_any_layout
def test_bytes_of_every_kind_on_every_rank(layout: Layout) -> None:
    part = part_of(layout)
    for index in range(len(layout.sets)):
        found = set_bytes(part, index)
        for rank, plans in layout.plans.items():
            place = rank.data_parallel, rank.tensor_parallel
            planned = bytes_sent(plans[index], REPLICAS)
            assert {kind: int(sent[place]) for kind, (sent, _) in found.items()} == planned


def of_two_methods() -> Layout:
    """One P divided over all ranks by its Gram matrix, one within a tensor group by `rcqr`."""
    grid = Grid(2, 4)
    weights = [Weight("flat", 16, 4096, 0, 2), Weight("square", 50, 100, 0, 2)]
    placements = in_one_bucket(weights, grid)
    return Layout(placements, grid, DionConfig(rank_fraction=1.0), [[0, 1]])


@given(layouts())
@example(of_two_methods())
@for_any_layout
def test_calls_for_what_divided_p_need(layout: Layout) -> None:
    part = part_of(layout)
    [plans, *_] = layout.plans.values()
    for index, plan in enumerate(plans):
        found = set_bytes(part, index)
        reductions = [*plan.part_reductions, plan.merging(plan.merged)]
        for group in ("tensor", "data"):
            hops = [getattr(each, f"{group}_hop") for each in reductions]
            sent, _ = found[f"{group} parts"]
            expected = 2 * sum(not hop.is_silent for hop in hops)
            assert calls_of(part, index, f"{group} parts", sent) == expected


def sent_in_node(plan: Plan) -> int:
    """Bytes for P that a rank sends to data-parallel ranks of its node, there and back."""
    d = plan.rank.data_parallel
    hop = plan.left.data_hop
    return 4 * sum(
        (tile.stop - tile.start) * plan.matrices[tile.matrix].rank
        for peers in (hop.sends, hop.receives)
        for peer, tiles in enumerate(peers)
        if peer != d and peer // PER_NODE == d // PER_NODE
        for tile in tiles
    )


@given(layouts())
@for_any_layout
def test_what_stays_on_a_node(layout: Layout) -> None:
    part = part_of(layout)
    for index in range(len(layout.sets)):
        _, in_node = set_bytes(part, index)["data left"]
        assert in_node is not None
        for rank, plans in layout.plans.items():
            expected = sent_in_node(plans[index])
            assert in_node[rank.data_parallel, rank.tensor_parallel] == expected


@given(layouts())
@for_any_layout
def test_state_on_every_rank(layout: Layout) -> None:
    momenta, factors = dion_state(part_of(layout))
    for rank, plans in layout.plans.items():
        place = rank.data_parallel, rank.tensor_parallel
        held = [(plan, block) for plan in plans for block in plan.held]
        assert momenta[place] == 4 * sum(block.rectangle.numel for _, block in held)
        assert factors[place] == 4 * sum(
            block.rectangle.rows * kept(plan, block.placement, block.matrix, rank)
            for plan, block in held
        )


def kept(plan: Plan, placement: int, matrix: int, rank: Rank) -> int:
    columns = plan.layout.share(placement, plan.matrices[matrix].rank, rank)
    return columns.stop - columns.start


def test_rings_leave_nodes_once() -> None:
    assert Group(8, 1, 8).leaving == 0
    assert Group(64, 1, 8).leaving == 1 / 8
    assert Group(64, 8, 8).leaving == 1
    assert np.isclose(Group(4, 2, 8).leaving, 0)
