"""The loads of all ranks are what their plans say, and none of them is far from the mean."""

import subprocess
import sys

import pytest
from hypothesis import given

from megatron_dion import DionConfig
from megatron_dion.planning.layout import default_bucket_size, place
from megatron_dion.planning.loads import Load, busiest_to_mean, describe, loads
from megatron_dion.planning.models import PRESETS
from megatron_dion.sharding import Grid, Plan, Planner, Rank, sets_in_turn
from megatron_dion.sharding.traffic import bytes_sent
from tests.unit.test_plan import Layout, for_any_layout, layouts


@given(layouts())
@for_any_layout
def test_loads_are_what_the_plans_say(layout: Layout) -> None:
    found = loads(layout.planner)
    for rank, plans in layout.plans.items():
        load = found[rank]
        assert load.held == sum(held.rectangle.numel for plan in plans for held in plan.held)
        tensor = sum(sent(plan, "tensor") for plan in plans)
        data = sum(sent(plan, "data") for plan in plans)
        assert (load.tensor_sent, load.data_sent) == (tensor, data)


def sent(plan: Plan, group: str) -> int:
    """Bytes for P, for dividing it, and for Gram matrices, without flags and all_reduces."""
    found = bytes_sent(plan)
    size = getattr(plan.layout.grid, f"{group}_parallel_size")
    divided = sum(len(plan.charges[k]) > 1 for k in plan.members)
    flags = 2 * 4 * divided * (size - 1) // size if plan.part_sums else 0
    grams = 0
    if plan.grams is not None:
        grams = found[f"{group} right"] - (gathered(plan) if group == "tensor" else 0)
    return found[f"{group} left"] + found[f"{group} parts"] - flags + grams


def gathered(plan: Plan) -> int:
    """Bytes of the columns of Q that a rank sends to its tensor-parallel group."""
    ranks = plan.layout.grid.tensor_group(plan.rank)

    def numel(rank: Rank) -> int:
        widths = [
            (
                held.rectangle.rows,
                plan.layout.share(held.placement, plan.matrices[held.matrix].rank, rank),
            )
            for held in plan.held
            if plan.has_partial_rows(held)
        ]
        return sum(rows * (columns.stop - columns.start) for rows, columns in widths)

    return 4 * (len(ranks) - 1) * max(numel(rank) for rank in ranks)


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
        found = loads(Planner(placements, grid, DionConfig(), sets)).values()
        for name in ("sent", "summed", "operations"):
            assert busiest_to_mean(found, name) <= 2, (dp, name)


def test_table_names_the_busiest() -> None:
    table = describe({Rank(0, d): Load(held=d, data_sent=10 * d) for d in range(3)}, most=2)
    lines = table.splitlines()
    assert lines[1].split()[:4] == ["tp", "0", "dp", "0"]
    assert lines[3] == "... 1 more ranks"
    assert lines[-1].split()[3] == "2.00"  # 2 held by the last rank, 1 in the mean


def test_the_tool_prints_a_row_for_each_size() -> None:
    command = [sys.executable, "tools/plan.py", "8B", "--dp", "2", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[:4] for line in done.stdout.splitlines()[1:]] == [
        ["8B", "1", "1", "2"],
        ["8B", "1", "1", "4"],
    ]
    wrong = subprocess.run([*command, "--pp", "5"], capture_output=True, text=True, check=False)
    assert wrong.returncode != 0
    assert "32" in wrong.stderr
    assert "Traceback" not in wrong.stderr
