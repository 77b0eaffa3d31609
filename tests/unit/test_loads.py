"""The loads of all ranks are what their plans say, and none of them is far from the mean."""

import pytest
from hypothesis import given
from megatron_dion.sharding.balance import operations

from megatron_dion import DionConfig
from megatron_dion.sharding import Grid, Placement, Planner, Rank, Weight, sets_in_turn
from megatron_dion.sharding.traffic import bytes_sent
from megatron_dion_tools.plan.layout import default_bucket_size, place
from megatron_dion_tools.plan.loads import Load, busiest_to_mean, describe, loads
from megatron_dion_tools.plan.models import PRESETS
from tests.unit.test_plan import Layout, for_any_layout, layouts


@given(layouts())
@for_any_layout
def test_loads_are_what_the_plans_say(layout: Layout) -> None:
    found = loads(layout.planner)
    for rank, plans in layout.plans.items():
        load = found[rank]
        assert load.held == sum(held.rectangle.numel for plan in plans for held in plan.held)
        for group, found_there in (("tensor", load.tensor_sent), ("data", load.data_sent)):
            kinds = [f"{group} {kind}" for kind in ("left", "parts", "right")]
            assert found_there == sum(bytes_sent(plan)[kind] for plan in plans for kind in kinds)


@pytest.mark.parametrize(
    ("model", "tp", "pp", "sizes"),
    [("8B", 1, 1, (8, 64, 256)), ("70B", 8, 4, (8, 64)), ("405B", 8, 14, (8, 64))],
)
def test_no_rank_has_more_than_twice_the_mean(
    model: str, tp: int, pp: int, sizes: tuple[int, ...]
) -> None:
    shape = PRESETS[model]
    for dp in sizes:
        weights = shape.weights(shape.stage_layers(pp, pp - 1), tp)
        placements = place(weights, dp, default_bucket_size(dp, pp - 1))
        grid = Grid(tp, dp)
        sets = sets_in_turn(placements, range(len(placements)), grid.size)
        planner = Planner(placements, grid, DionConfig(), sets)
        found = loads(planner).values()
        for name in ("sent", "summed"):
            assert busiest_to_mean(found, name) <= 2, (dp, name)
        # No more than a tensor-parallel group can share a matrix.
        dearest = max(operations(m, m.columns // tp) for m in planner.layout.matrices)
        mean = sum(load.operations for load in found) / len(found)
        assert max(load.operations for load in found) <= max(2 * mean, 1.1 * dearest), dp


def test_table_names_the_busiest() -> None:
    table = describe({Rank(0, d): Load(held=d, data_sent=10 * d) for d in range(3)}, most=2)
    lines = table.splitlines()
    assert lines[1].split()[:4] == ["tp", "0", "dp", "0"]
    assert lines[3] == "... 1 more ranks"
    assert lines[-1].split()[3] == "2.00"  # 2 held by the last rank, 1 in the mean


def test_norms_are_summed_by_all_holders_in_turn() -> None:
    """Each sends no more than in a ring: 2 (4 - 1) / 4 of 8 x 16 numbers in float64."""
    weights = [Weight(f"w{i}", 16, 64, 0, tensor_parallel_size=4) for i in range(8)]
    placements = [Placement(weight, i * 1024, 8 * 1024) for i, weight in enumerate(weights)]
    planner = Planner(placements, Grid(4, 1), DionConfig(rank_fraction=0.25))
    for rank in planner.layout.grid.ranks():
        [plan] = planner.plans(rank)
        assert bytes_sent(plan)["tensor right"] == 8 * 1.5 * 8 * 16
