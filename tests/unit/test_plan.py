"""Properties of plans for any shapes, fusions, buckets and grids, without a process."""

import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dion import DionConfig
from megatron_dion.sharding.collectives import Groups
from megatron_dion.sharding.exchange import ShardedExchange
from megatron_dion.sharding.layout import Grid, Layout, Placement, Rank
from megatron_dion.sharding.matrices import Part, Weight
from megatron_dion.sharding.plan import Hop, Plan, make_plan, sets_of

sizes = st.integers(1, 12)
for_any_layout = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def weights(draw: st.DrawFn, tp: int, name: str) -> Weight:
    dim = draw(st.sampled_from([0, 1, None])) if tp > 1 else None
    parts = tuple(Part(f"part{i}", draw(sizes)) for i in range(draw(st.integers(1, 3))))
    period = sum(part.rows for part in parts)
    # A period may go over several tensor-parallel ranks.
    rows = draw(st.integers(1, 3)) * (period // math.gcd(period, tp) if dim == 0 else period)
    grouping = draw(st.sampled_from([{}, {"separate_periods": True}, {"joined": True}]))
    return Weight(name, rows, draw(sizes), dim, tp, parts, **grouping)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    grid = Grid(draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    placements: list[Placement] = []
    for bucket in range(draw(st.integers(1, 2))):
        members, position = [], 0
        for index in range(draw(st.integers(1, 3))):
            weight = draw(weights(grid.tensor_parallel_size, f"weight{bucket}.{index}"))
            members.append((weight, position))
            position += weight.rows * weight.columns + draw(st.integers(0, 5))
        numel = math.ceil(position / grid.data_parallel_size) * grid.data_parallel_size
        placements += [Placement(weight, start, numel) for weight, start in members]
    return Layout(placements, grid, DionConfig(rank_fraction=draw(st.sampled_from([0.3, 1.0]))))


def plans_of(layout: Layout) -> dict[Rank, Plan]:
    return {rank: make_plan(layout, rank) for rank in layout.grid.ranks()}


@given(layouts())
@for_any_layout
def test_every_element_is_held_once_or_by_every_copy(layout: Layout) -> None:
    count = [torch.zeros(m.rows, m.columns, dtype=torch.int) for m in layout.matrices]
    copies = [0] * len(layout.matrices)
    for plan in plans_of(layout).values():
        end = defaultdict(int)
        for placement, r in sorted(plan.rectangles, key=lambda each: each[1].offset):
            count[r.matrix][r.row_start : r.row_stop, r.column_start : r.column_stop] += 1
            weight = layout.placements[placement].weight
            is_copied = layout.shares_rows(placement) and weight.partition_dim is None
            copies[r.matrix] = layout.grid.tensor_parallel_size if is_copied else 1
            assert r.offset == end[placement]  # consecutive in memory
            end[placement] += r.numel
        partial = [layout.shares_rows(placement) for placement, _ in plan.rectangles]
        assert partial == sorted(partial, reverse=True)
        assert plan.has_partial_rows == any(map(layout.shares_rows, range(len(layout.placements))))
    for matrix, each in enumerate(count):
        assert (each == copies[matrix]).all()


@given(layouts())
@for_any_layout
def test_every_row_of_p_reaches_its_owner_from_all_who_hold_it(layout: Layout) -> None:
    """Follows the hops: what is summed at the end, and that sender and receiver agree."""
    plans = plans_of(layout)
    grid = layout.grid
    # Who contributed to each row of P: counters of ranks, summed hop by hop.
    summed: dict[Rank, dict[int, list[Counter[Rank]]]] = {}
    for rank, plan in plans.items():
        rows = {k: [Counter() for _ in range(layout.matrices[k].columns)] for k in plan.members}
        for t, tiles in enumerate(plan.tensor_hop.receives):
            sender = Rank(t, rank.data_parallel)
            assert tiles == plans[sender].tensor_hop.sends[rank.tensor_parallel]
            for tile in tiles:
                for row in range(tile.start, tile.stop):
                    rows[tile.matrix][row][sender] += 1
        summed[rank] = rows
    for name in ("slice_hop", "owner_hop"):
        before, summed = summed, {}
        for rank, plan in plans.items():
            hop: Hop | None = getattr(plan, name)
            assert (hop is None) == (name == "slice_hop" and max(map(len, layout.holders)) < 4)
            if hop is None:
                summed[rank] = before[rank]
                continue
            rows = {k: [Counter() for _ in range(layout.matrices[k].columns)] for k in plan.members}
            for d, tiles in enumerate(hop.receives):
                sender = Rank(rank.tensor_parallel, d)
                assert tiles == getattr(plans[sender], name).sends[rank.data_parallel]
                for tile in tiles:
                    for row in range(tile.start, tile.stop):
                        rows[tile.matrix][row].update(before[sender][tile.matrix][row])
            summed[rank] = rows
    for rank, plan in plans.items():
        for tile in plan.owner_hop.sums:
            assert layout.owners[tile.matrix] == rank.data_parallel
            assert (tile.start, tile.stop) == layout.owned_rows(tile.matrix, rank.tensor_parallel)
            for row in range(tile.start, tile.stop):
                contributors = summed[rank][tile.matrix][row]
                assert set(contributors.values()) == {1}
                assert set(contributors) == {
                    other
                    for other, theirs in plans.items()
                    for mine in theirs.tiles
                    if mine.matrix == tile.matrix and mine.start <= row < mine.stop
                }
    for d in range(grid.data_parallel_size):  # ranks that orthonormalize together, in one order
        orders = {
            tuple(tile.matrix for tile in plans[rank].owner_hop.sums)
            for rank in grid.tensor_group(d)
        }
        [order] = orders
        assert sorted(order) == [k for k, owner in enumerate(layout.owners) if owner == d]


@given(layouts())
@for_any_layout
def test_rows_in_several_pieces_are_cut_rows_of_all_their_holders(layout: Layout) -> None:
    plans = plans_of(layout)
    for rank, plan in plans.items():
        rows: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for d in range(layout.grid.data_parallel_size):
            for _, r in plans[Rank(rank.tensor_parallel, d)].rectangles:
                for row in range(r.row_start, r.row_stop):
                    rows[r.matrix, row].add(d)
        for peer, cut in enumerate(plan.cut_rows):
            both = {key for key, holders in rows.items() if {peer, rank.data_parallel} <= holders}
            assert set(cut) == (both if peer != rank.data_parallel else set())
        assert plan.has_cut_rows == any(any(other.cut_rows) for other in plans.values())


@given(layouts(), st.integers(0, 30))
@for_any_layout
def test_slices_tile_what_tensor_parallel_ranks_have_in_common(layout: Layout, count: int) -> None:
    for placement in range(len(layout.placements)):
        group = layout.grid.tensor_group(0)
        slices = [layout.tensor_slice(placement, count, rank) for rank in group]
        tiled = [i for part in slices for i in range(part.start, part.stop)]
        repeated = 1 if layout.shares_rows(placement) else layout.grid.tensor_parallel_size
        assert tiled == list(range(count)) * repeated


@given(layouts(), st.integers(1, 5))
@for_any_layout
def test_every_weight_is_in_one_set(layout: Layout, count: int) -> None:
    config = DionConfig(exchange_sets=count)
    layout = Layout(layout.placements, layout.grid, config)
    indices = list(range(len(layout.placements)))
    sets = sets_of(layout, indices, layout.grid.size)
    assert sorted(index for each in sets for index in each) == indices
    assert len(sets) == min(1 if layout.grid.size == 1 else count, len(indices))


def test_owners_share_the_work_evenly() -> None:
    """Of 24 equal matrices in one bucket each of four ranks owns as many as it can."""
    weight, count = Weight("w", 12, 12), 24
    placements = [Placement(weight, 144 * i, 144 * count) for i in range(count)]
    layout = Layout(placements, Grid(1, 4), DionConfig())
    assert Counter(layout.owners) == dict.fromkeys(range(4), 6)
    for plan in plans_of(layout).values():  # where a rank holds a matrix whole, P stays at home
        sent = ShardedExchange(plan, Groups(), torch.device("meta")).bytes_sent()
        assert sent["data"] == 2 * 8 * (3 + 1) * count * 3 // 4  # norms alone


def test_a_matrix_with_a_single_holder_counts_before_those_with_a_choice() -> None:
    small, large = Weight("small", 12, 12), Weight("large", 12, 36)
    placements = [Placement(small, 0, 576), Placement(large, 144, 576)]
    layout = Layout(placements, Grid(1, 2), DionConfig())
    assert layout.holders == ((0,), (0, 1))
    assert layout.owners == (0, 1)


def test_qkv_of_two_groups_on_two_ranks() -> None:
    parts = (Part("query", 4), Part("key", 2), Part("value", 2))
    weight = Weight("qkv", 8, 6, 0, 2, parts)
    layout = Layout([Placement(weight, 0, 48)], Grid(2, 1), DionConfig())
    assert [m.name for m in layout.matrices] == ["qkv[query]", "qkv[key]", "qkv[value]"]
    rows = [
        [(r.matrix, r.row_start, r.row_stop) for r in layout.rectangles(0, Rank(t))] for t in (0, 1)
    ]
    assert rows == [[(0, 0, 4), (1, 0, 2), (2, 0, 2)], [(0, 4, 8), (1, 2, 4), (2, 2, 4)]]


def test_rows_that_are_no_whole_periods_are_refused() -> None:
    with pytest.raises(ValueError, match="qkv: 9 rows are no multiple of the 4 rows of"):
        Weight("qkv", 9, 6, parts=(Part("query", 2), Part("key", 2)))
