"""Properties of plans for any shapes, fusions, buckets, sets and grids, without a process."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.algorithm import ORTHONORMALIZERS, RIGHT_FACTORS, Matrix
from megatron_dion.algorithm.orthonormalize import packed_rows, summed_rows, usual_part_method
from megatron_dion.sharding import (
    Grid,
    Held,
    Part,
    Placement,
    Plan,
    Planner,
    Rank,
    Rectangle,
    Weight,
    balance,
)
from megatron_dion.sharding.balance import operations
from megatron_dion.sharding.blocks import rectangles
from megatron_dion.sharding.reduction import Hop, Reduction, Tile

sizes = st.integers(1, 12)
for_any_layout = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)


@dataclass(frozen=True)
class Layout:
    """A planner, and the plans of all ranks of its grid for all of its sets."""

    placements: list[Placement]
    grid: Grid
    config: DionConfig
    sets: list[list[int]]

    @cached_property
    def planner(self) -> Planner:
        return Planner(self.placements, self.grid, self.config, self.sets)

    @cached_property
    def plans(self) -> dict[Rank, list[Plan]]:
        return {rank: self.planner.plans(rank) for rank in self.grid.ranks()}

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.planner.layout.matrices

    def each_set(self) -> Iterator[dict[Rank, Plan]]:
        return (
            {rank: plans[i] for rank, plans in self.plans.items()} for i in range(len(self.sets))
        )

    def held(self) -> Iterator[tuple[Rank, Held]]:
        for rank, plans in self.plans.items():
            for plan in plans:
                for held in plan.held:
                    yield rank, held

    def copies(self, placement: int) -> int:
        """How often every element is there."""
        dim = self.placements[placement].weight.partition_dim
        return self.grid.tensor_parallel_size if dim is None else 1

    def placement_of(self, matrix: int) -> int:
        return self.placements.index(self.planner.layout.placement(matrix))


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
def layouts(draw: st.DrawFn, orthonormalizers: tuple[str, ...] = ORTHONORMALIZERS) -> Layout:
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
    config = DionConfig(
        rank_fraction=draw(st.sampled_from([0.3, 0.5, 1.0])),
        orthonormalizer=draw(st.sampled_from(orthonormalizers)),
        right_factor=draw(st.sampled_from(RIGHT_FACTORS)),
    )
    of_set = [draw(st.integers(0, 2)) for _ in placements]
    sets = [[i for i, s in enumerate(of_set) if s == index] for index in range(3)]
    return Layout(placements, grid, config, [members for members in sets if members])


def data_group(grid: Grid, rank: Rank) -> list[Rank]:
    return [Rank(rank.tensor_parallel, d) for d in range(grid.data_parallel_size)]


@given(layouts())
@for_any_layout
def test_every_element_lies_in_one_block_or_one_of_each_replica(layout: Layout) -> None:
    count = [torch.zeros(m.rows, m.columns, dtype=torch.int) for m in layout.matrices]
    for _, held in layout.held():
        r = held.rectangle
        count[held.matrix][r.row_start : r.row_stop, r.column_start : r.column_stop] += 1
    for matrix, found in enumerate(count):
        assert (found == layout.copies(layout.placement_of(matrix))).all()


@given(layouts())
@for_any_layout
def test_every_matrix_is_a_member_of_one_set(layout: Layout) -> None:
    members = [layout.planner.members(i) for i in range(len(layout.sets))]
    assert sorted(k for chosen in members for k in chosen) == list(range(len(layout.matrices)))
    for plans in layout.plans.values():
        assert [plan.members for plan in plans] == members
        for plan in plans:
            assert {held.matrix for held in plan.held} <= set(plan.members)


@given(layouts())
@for_any_layout
def test_blocks_are_consecutive_in_memory(layout: Layout) -> None:
    offsets = {(rank, i): 0 for rank in layout.plans for i in range(len(layout.placements))}
    for rank, held in layout.held():
        assert held.rectangle.offset == offsets[rank, held.placement]
        offsets[rank, held.placement] += held.rectangle.numel
    for (rank, index), offset in offsets.items():
        piece = layout.placements[index].piece(rank.data_parallel, layout.grid.data_parallel_size)
        assert offset == piece[1] - piece[0]


@given(layouts())
@for_any_layout
def test_blocks_with_partial_rows_come_first(layout: Layout) -> None:
    for plans in layout.plans.values():
        for plan in plans:
            partial = [plan.is_partial(held) for held in plan.held]
            assert partial == sorted(partial, reverse=True)


def tiles_rows(slices: list[slice], rows: int) -> bool:
    """Whether they follow each other from 0 to `rows`."""
    ends = [0, *(part.stop for part in slices)]
    return [part.start for part in slices] == ends[:-1] and ends[-1] == rows


@given(layouts())
@for_any_layout
def test_multiplied_rows_of_copies_tile_the_rows(layout: Layout) -> None:
    copies: dict[tuple[int, int, Rectangle], list[slice]] = {}
    for rank, held in layout.held():
        if layout.copies(held.placement) > 1:
            key = (rank.data_parallel, held.placement, held.rectangle)
            copies.setdefault(key, []).append(held.multiplied)
        else:
            assert held.multiplied == slice(0, held.rectangle.rows)
    for (_, _, rectangle), slices in copies.items():
        assert tiles_rows(slices, rectangle.rows)


@given(layouts(), st.integers(0, 30))
@for_any_layout
def test_shares_tile_what_tensor_parallel_ranks_have_in_common(layout: Layout, numel: int) -> None:
    for index, placement in enumerate(layout.placements):
        group = layout.grid.tensor_group(Rank())
        shares = [layout.planner.layout.share(index, numel, rank) for rank in group]
        if placement.weight.partition_dim == 0:
            assert shares == [slice(0, numel)] * len(group)
        else:
            assert tiles_rows(shares, numel)
            assert max(s.stop - s.start for s in shares) - min(s.stop - s.start for s in shares) < 2


@given(layouts())
@for_any_layout
def test_charges_cover_the_rows_of_every_left_factor(layout: Layout) -> None:
    charges = layout.planner.charges
    assert sorted(charges) == list(range(len(layout.matrices)))
    holders: dict[int, set[Rank]] = {}
    for rank, held in layout.held():
        holders.setdefault(held.matrix, set()).add(rank)
    for k, matrix in enumerate(layout.matrices):
        assert all(charge.matrix == k and charge.start < charge.stop for charge in charges[k])
        rows = [slice(charge.start, charge.stop) for charge in charges[k]]
        assert tiles_rows(rows, matrix.columns)
        ranks = [charge.rank for charge in charges[k]]
        assert len(set(ranks)) == len(ranks)
        assert len(ranks) > 1 or set(ranks) <= holders[k]
        if k in layout.planner.owners:
            assert len({rank.data_parallel for rank in ranks}) == 1
            assert layout.planner.owners[k] in set(ranks) & holders[k]
            for charge in charges[k]:
                [(start, stop)] = {(c.start, c.stop) for c in charges[k] if c.rank == charge.rank}
                weight = layout.planner.layout.placement(k).weight
                assert start == weight.first_column(charge.rank.tensor_parallel)
                assert stop - start == weight.columns
    for rank, plans in layout.plans.items():
        mine = [
            Tile(charge.matrix, charge.start, charge.stop, index)
            for k in charges
            for index, charge in enumerate(charges[k])
            if charge.rank == rank
        ]
        summed = [tile for plan in plans for tile in plan.left.data_hop.sums]
        assert sorted(summed, key=key) == sorted(mine, key=key)


def key(tile: Tile) -> tuple[int, int]:
    return tile.matrix, tile.charge


Rows = dict[Rank, dict[int, Tensor]]
"""For each rank and matrix int64 (rows,), one number for each row."""
Reductions = dict[Rank, Reduction]


def reductions(plans: Mapping[Rank, Plan]) -> list[Reductions]:
    """All reductions of a set of matrices: of P, of parts, of broken P, for Q."""
    found = [
        {rank: plan.left for rank, plan in plans.items()},
        {rank: plan.right for rank, plan in plans.items()},
    ]
    phases = zip(*(plan.part_reductions for plan in plans.values()), strict=True)
    found += [dict(zip(plans, phase, strict=True)) for phase in phases]
    for chosen in (plans[Rank()].divided, plans[Rank()].merged):
        found.append({rank: plan.merging(chosen) for rank, plan in plans.items()})
    return found


@given(layouts())
@for_any_layout
def test_what_is_sent_is_received(layout: Layout) -> None:
    for plans in layout.each_set():
        for each in reductions(plans):
            for rank, reduction in each.items():
                # The second hop sends from the memory into which the first one sums.
                sent_on = [tile for tiles in reduction.data_hop.sends for tile in tiles]
                assert tuple(sent_on) == reduction.tensor_hop.sums
                for peer in layout.grid.tensor_group(rank):
                    sent = reduction.tensor_hop.sends[peer.tensor_parallel]
                    assert sent == each[peer].tensor_hop.receives[rank.tensor_parallel]
                for peer in data_group(layout.grid, rank):
                    sent = reduction.data_hop.sends[peer.data_parallel]
                    assert sent == each[peer].data_hop.receives[rank.data_parallel]
        for rank, plan in plans.items():
            for peer in data_group(layout.grid, rank):
                shared = plans[peer].shared_rows[rank.data_parallel]
                assert plan.shared_rows[peer.data_parallel] == shared


class Memory:
    """Tiles of a rank with a number for each of their rows, by matrix and charge."""

    def __init__(self, tiles: tuple[Tile, ...]) -> None:
        self.tiles = {key(tile): tile for tile in tiles}
        assert len(self.tiles) == len(tiles)
        self.values = {
            key(tile): torch.zeros(tile.stop - tile.start, dtype=torch.int64) for tile in tiles
        }

    def view(self, tile: Tile) -> Tensor:
        """The rows of a tile, which must be there."""
        whole = self.tiles[key(tile)]
        assert whole.start <= tile.start < tile.stop <= whole.stop
        return self.values[key(tile)][tile.start - whole.start : tile.stop - whole.start]


class Simulation:
    """Carries out the reductions of all ranks with one number for each row."""

    def __init__(self, each: Reductions, grid: Grid) -> None:
        self._each = each
        self._grid = grid
        self._near = {rank: Memory(r.tensor_hop.sums) for rank, r in each.items()}
        self.sums = {rank: Memory(r.data_hop.sums) for rank, r in each.items()}

    def sum(self, rows: Rows) -> None:
        """`rows` are all rows of a matrix, with zeros where a rank contributes nothing."""
        for rank, tile, peer in self._ways(lambda r: r.tensor_hop, self._grid.tensor_group):
            part = rows[rank][tile.matrix][tile.start : tile.stop]
            self._near[peer].view(tile).add_(part)
        for rank, tile, peer in self._ways(lambda r: r.data_hop, partial(data_group, self._grid)):
            self.sums[peer].view(tile).add_(self._near[rank].view(tile))

    def spread(self, rows: Rows) -> None:
        """Overwrites the rows of all tiles with their sums."""
        for rank, tile, peer in self._ways(lambda r: r.data_hop, partial(data_group, self._grid)):
            self._near[rank].view(tile).copy_(self.sums[peer].view(tile))
        for rank, tile, peer in self._ways(lambda r: r.tensor_hop, self._grid.tensor_group):
            rows[rank][tile.matrix][tile.start : tile.stop] = self._near[peer].view(tile)

    def _ways(
        self, hop: Callable[[Reduction], Hop], group: Callable[[Rank], list[Rank]]
    ) -> Iterator[tuple[Rank, Tile, Rank]]:
        """Sender, tile and receiver."""
        for rank, reduction in self._each.items():
            sends = hop(reduction).sends
            for peer, tiles in zip(group(rank), sends, strict=True):
                for tile in tiles:
                    yield rank, tile, peer


def random_elements(layout: Layout) -> list[Tensor]:
    """Positive numbers, whose sums tell which of them are there."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(1, 1 << 40, (m.rows, m.columns), generator=generator) for m in layout.matrices
    ]


def column_sums(layout: Layout, elements: list[Tensor]) -> Rows:
    """What every rank contributes: sums over the rows that it multiplies."""
    rows = {
        rank: {k: torch.zeros(m.columns, dtype=torch.int64) for k, m in enumerate(layout.matrices)}
        for rank in layout.plans
    }
    for rank, held in layout.held():
        r = held.rectangle
        columns = slice(r.column_start, r.column_stop)
        block = elements[held.matrix][r.row_start : r.row_stop, columns]
        rows[rank][held.matrix][columns] += block[held.multiplied].sum(dim=0)
    return rows


@given(layouts())
@for_any_layout
def test_every_element_arrives_once_in_the_charge_of_its_column_and_the_sum_comes_back(
    layout: Layout,
) -> None:
    elements = random_elements(layout)
    rows = column_sums(layout, elements)
    for plans in layout.each_set():
        simulation = Simulation({rank: plan.left for rank, plan in plans.items()}, layout.grid)
        simulation.sum(rows)
        for plan in plans.values():
            for tile in plan.left.data_hop.sums:
                expected = elements[tile.matrix].sum(dim=0)[tile.start : tile.stop]
                assert torch.equal(simulation.sums[plan.rank].view(tile), expected)
        simulation.spread(rows)
    for rank, held in layout.held():
        columns = slice(held.rectangle.column_start, held.rectangle.column_stop)
        found = rows[rank][held.matrix][columns]
        assert torch.equal(found, elements[held.matrix].sum(dim=0)[columns])


def assert_everyone_gets_the_total(
    each: Reductions, grid: Grid, heights: dict[int, int], participants: dict[int, set[Rank]]
) -> None:
    """Nobody else sends anything, and the sums are in the hands of participants."""
    generator = torch.Generator().manual_seed(0)
    rows: Rows = {
        rank: {
            k: torch.randint(1, 1 << 40, (height,), generator=generator)
            if rank in participants[k]
            else torch.full((height,), -1)
            for k, height in heights.items()
        }
        for rank in each
    }
    totals = {k: sum(rows[rank][k] for rank in participants[k]) for k in heights}
    simulation = Simulation(each, grid)
    simulation.sum(rows)
    simulation.spread(rows)
    for rank, own in rows.items():
        for k, found in own.items():
            expected = totals[k] if rank in participants[k] else torch.full((heights[k],), -1)
            assert torch.equal(found, expected)
    for rank, reduction in each.items():
        assert all(rank in participants[tile.matrix] for tile in reduction.data_hop.sums)


@given(layouts())
@for_any_layout
def test_sums_of_parts_reach_all_who_have_rows(layout: Layout) -> None:
    charges, config = layout.planner.charges, layout.config
    for plans in layout.each_set():
        divided = plans[Rank()].divided
        ranks = {k: {charge.rank for charge in charges[k]} for k in divided}
        by_method: dict[str, list[int]] = {}
        for k in divided:
            matrix = layout.matrices[k]
            method = usual_part_method(config.orthonormalizer, matrix.columns, matrix.rank)
            by_method.setdefault(method, []).append(k)
        assert all(plan.part_sums.keys() == by_method.keys() for plan in plans.values())
        for method, members in by_method.items():
            heights = [
                summed_rows(method, layout.matrices[k].rank, config.oversample) for k in members
            ]
            phases = zip(*heights, strict=True)
            for i, rows in enumerate(phases):
                each = {rank: plan.part_sums[method][i] for rank, plan in plans.items()}
                of_phase = dict(zip(members, rows, strict=True))
                assert_everyone_gets_the_total(each, layout.grid, of_phase, ranks)
            assert all(len(plan.part_sums[method]) == i + 1 for plan in plans.values())


@given(layouts())
@for_any_layout
def test_norms_and_gram_matrices_reach_all_holders(layout: Layout) -> None:
    holders: dict[int, set[Rank]] = {}
    for rank, held in layout.held():
        holders.setdefault(held.matrix, set()).add(rank)
    for plans in layout.each_set():
        shared = [k for k in plans[Rank()].members if len(holders[k]) > 1]
        is_gram = layout.config.right_factor == "orth"
        heights = {k: layout.matrices[k].rank if is_gram else 1 for k in shared}
        each = {rank: plan.right for rank, plan in plans.items()}
        ranks = {k: holders[k] for k in shared}
        assert_everyone_gets_the_total(each, layout.grid, heights, ranks)


@given(layouts())
@for_any_layout
def test_all_ranks_know_whether_any_shares_rows(layout: Layout) -> None:
    """Else some would call and some would not."""
    for plans in layout.each_set():
        cut = any(any(plan.shared_rows) for plan in plans.values())
        assert {plan.has_shared_rows for plan in plans.values()} == {cut}
        partial = any(plan.is_partial(held) for plan in plans.values() for held in plan.held)
        assert {plan.has_partial_rows for plan in plans.values()} == {partial}


@given(layouts())
@for_any_layout
def test_a_hop_is_silent_where_nobody_sends(layout: Layout) -> None:
    for plans in layout.each_set():
        for each in reductions(plans):
            for name, me in (("tensor_hop", "tensor_parallel"), ("data_hop", "data_parallel")):
                hops = {rank: getattr(reduction, name) for rank, reduction in each.items()}
                [is_silent] = {hop.is_silent for hop in hops.values()}
                sent = any(
                    tiles
                    for rank, hop in hops.items()
                    for peer, tiles in enumerate(hop.sends)
                    if peer != getattr(rank, me)
                )
                assert is_silent != sent


@given(layouts())
@for_any_layout
def test_triangles_are_brought_to_one_rank_and_come_back(layout: Layout) -> None:
    charges, owners = layout.planner.charges, layout.planner.owners
    turns = [k for k in sorted(charges) if len(charges[k]) > 1 and k not in owners]
    for plans in layout.each_set():
        divided, merged = plans[Rank()].divided, plans[Rank()].merged
        for chosen in (divided, divided[::2], merged, merged[::2]):
            bounds: dict[int, list[int]] = {}
            for k in chosen:
                rank = layout.matrices[k].rank
                sizes = [packed_rows(c.stop - c.start, rank) for c in charges[k]]
                bounds[k] = [0, *accumulate(sizes)]
            whole = {k: torch.arange(1, bounds[k][-1] + 1) for k in chosen}
            rows: Rows = {rank: {k: torch.zeros_like(whole[k]) for k in chosen} for rank in plans}
            places = [
                (k, c.rank, slice(*where))
                for k in chosen
                for c, where in zip(charges[k], pairwise(bounds[k]), strict=True)
            ]
            for k, rank, place in places:
                rows[rank][k][place] = whole[k][place]
            each = {rank: plan.merging(chosen) for rank, plan in plans.items()}
            simulation = Simulation(each, layout.grid)
            simulation.sum(rows)
            rows_on_one = dict.fromkeys(chosen, 0)
            for rank, reduction in each.items():
                for tile in reduction.data_hop.sums:
                    k, several = tile.matrix, charges[tile.matrix]
                    turn = turns.index(k) if k in turns else 0
                    assert rank == owners.get(k, several[turn % len(several)].rank)
                    section = simulation.sums[rank].values[key(tile)]
                    assert torch.equal(section, whole[tile.matrix][tile.start : tile.stop])
                    rows_on_one[tile.matrix] += tile.stop - tile.start
            assert rows_on_one == {k: bounds[k][-1] for k in chosen}
            for memory in simulation.sums.values():
                for values in memory.values.values():
                    values.neg_()
            simulation.spread(rows)
            for k, rank, place in places:
                assert torch.equal(rows[rank][k][place], -whole[k][place])


@given(layouts())
@for_any_layout
def test_rows_in_several_pieces_are_shared_rows(layout: Layout) -> None:
    for plans in layout.each_set():
        pieces: dict[tuple[int, int, int], set[int]] = {}
        for rank, plan in plans.items():
            for held in plan.held:
                for row in range(held.rectangle.row_start, held.rectangle.row_stop):
                    where = (rank.tensor_parallel, held.matrix, row)
                    pieces.setdefault(where, set()).add(rank.data_parallel)
        for rank, plan in plans.items():
            for d, shared in enumerate(plan.shared_rows):
                expected = {
                    (matrix, row)
                    for (t, matrix, row), holders in pieces.items()
                    if t == rank.tensor_parallel and {rank.data_parallel, d} <= holders
                }
                found = [(row.matrix, row.row) for row in shared]
                assert found == (sorted(expected) if d != rank.data_parallel else [])


@given(layouts(orthonormalizers=("qr",)))
@for_any_layout
def test_householder_is_never_divided(layout: Layout) -> None:
    """By sums, that is."""
    owners = layout.planner.owners
    assert all(len(c) == 1 or k in owners for k, c in layout.planner.charges.items())
    assert not any(plan.part_sums for plans in layout.plans.values() for plan in plans)


def in_one_bucket(weights: list[Weight], grid: Grid) -> list[Placement]:
    starts = [0]
    for weight in weights:
        starts.append(starts[-1] + weight.rows * weight.columns)
    numel = math.ceil(starts[-1] / grid.data_parallel_size) * grid.data_parallel_size
    return [Placement(w, start, numel) for w, start in zip(weights, starts[:-1], strict=True)]


def squares(count: int, side: int, **options: int) -> list[Weight]:
    return [Weight(f"w{i}", side, side, **options) for i in range(count)]


@pytest.mark.parametrize("grid", [Grid(1, 4), Grid(2, 2), Grid(4, 1)])
@pytest.mark.parametrize("count", [4, 8, 12])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_small_equal_matrices_stay_within_tensor_parallel_groups(
    grid: Grid, count: int, dim: int, fraction: float
) -> None:
    """Each is one rank's, or the rows of P stay where they are, by sums or by triangles."""
    tp = grid.tensor_parallel_size
    rows, columns = (64 // tp, 64) if dim == 0 else (64, 64 // tp)
    weights = [Weight(f"w{i}", rows, columns, dim, tp) for i in range(count)]
    config = DionConfig(rank_fraction=fraction)
    planner = Planner(in_one_bucket(weights, grid), grid, config)
    in_sections = list(range(count)) if dim == 1 and tp > 1 else []
    by_sums = in_sections if fraction < 1 else []
    assert planner.divided(0) == by_sums
    assert sorted(planner.owners) == [k for k in in_sections if k not in by_sums]
    for k, charges in planner.charges.items():
        ranks = [charge.rank for charge in charges]
        expected = grid.tensor_group(ranks[0]) if k in in_sections else ranks[:1]
        assert ranks == expected
        assert [charge.stop for charge in charges][-1] == 64


def test_a_divided_row_parallel_matrix_has_its_rows_at_home() -> None:
    """It is divided over whole groups, also where fewer ranks would do."""
    grid = Grid(4, 2)
    weights = [Weight("big", 96, 64 // 4, 1, 4), *squares(20, 24, partition_dim=0)]
    weights[1:] = [replace(w, rows=6, tensor_parallel_size=4) for w in weights[1:]]
    for fraction in (0.25, 0.5, 1.0):
        config = DionConfig(rank_fraction=fraction, orthonormalizer="rcqr")
        planner = Planner(in_one_bucket(weights, grid), grid, config)
        charges = planner.charges[0]
        assert 0 not in planner.owners
        assert len(charges) % 4 == 0
        for charge in charges:
            home = range(16 * charge.rank.tensor_parallel, 16 * (charge.rank.tensor_parallel + 1))
            assert set(range(charge.start, charge.stop)) <= set(home)


@pytest.mark.parametrize("orthonormalizer", ["rcqr", "cqr"])
@pytest.mark.parametrize("fraction", [0.05, 0.25, 1.0])
def test_more_than_an_even_share_is_divided_as_far_as_needed(
    fraction: float, orthonormalizer: str
) -> None:
    grid = Grid(1, 12)
    config = DionConfig(rank_fraction=fraction, orthonormalizer=orthonormalizer)
    weights = [Weight("big", 3000, 300), *squares(60, 100)]
    layout = Layout(in_one_bucket(weights, grid), grid, config, [list(range(61))])
    big, charges = layout.matrices[0], layout.planner.charges
    costs = [operations(m, m.columns) for m in layout.matrices]
    even = sum(costs) / grid.size
    assert costs[0] > even
    holders = layout.placements[0].holders(grid.data_parallel_size)
    count = len(charges[0])
    assert 1 < count <= len(holders)
    if count < len(holders):
        # Rounding to whole rows is at most one row.
        assert operations(big, math.floor(big.columns / count)) <= 0.9 * even
    assert operations(big, math.ceil(big.columns / (count - 1))) > 0.9 * even
    assert max(c.stop - c.start for c in charges[0]) - big.columns // count <= 1
    assert all(len(charges[k]) == 1 for k in range(1, 61))


def test_a_single_matrix_is_divided_over_all_its_holders() -> None:
    grid = Grid(4, 1)
    weight = Weight("w", 12, 6, partition_dim=1, tensor_parallel_size=4)
    planner = Planner(in_one_bucket([weight], grid), grid, DionConfig())
    assert [charge.rank for charge in planner.charges[0]] == sorted(grid.ranks())
    assert {charge.stop - charge.start for charge in planner.charges[0]} == {6}
    householder = Planner(planner.layout.placements, grid, DionConfig(orthonormalizer="qr"))
    assert not householder.plans(Rank())[0].part_sums


def test_a_rank_that_is_busy_is_spared() -> None:
    """Of the second set, which all could do, those without work of the first do all."""
    grid = Grid(2, 1)
    weights = [Weight(f"w{i}", 8, 16, 0, 2) for i in range(2)]
    planner = Planner(
        in_one_bucket(weights, grid), grid, DionConfig(orthonormalizer="qr"), [[0], [1]]
    )
    assert planner.charges[0][0].rank != planner.charges[1][0].rank


def test_what_is_taken_off_a_burden_is_what_was_added() -> None:
    """Also where tensor-parallel ranks' shares of what they send are no whole numbers."""
    grid = Grid(2, 1)
    weights = [Weight("w", 5, 3, 0, 2)]
    planner = Planner(in_one_bucket(weights, grid), grid, DionConfig(rank_fraction=1))
    assert [charge.stop - charge.start for charge in planner.charges[0]] == [1, 2]
    assert not planner.owners
    burden = balance._Burden()
    for sign in (1, -1):
        division = balance.Division(planner.charges, planner.owners)
        balance._add(burden, planner.layout, division, 0, sign)
    assert set(burden._of) == {"operations", "summed", "sent"}
    assert not any(amount for found in burden._of.values() for amount in found.values())


def test_charges_are_balanced() -> None:
    weight = Weight("w", 256, 256)
    placements = [
        Placement(replace(weight, name=f"w{i}"), i * 256 * 256, 32 * 256 * 256) for i in range(32)
    ]
    # Each of four ranks holds eight whole matrices and must decide those.
    grid = Grid(1, 4)
    planner = Planner(placements, grid, DionConfig(rank_fraction=0.5))
    for rank in grid.ranks():
        [plan] = planner.plans(rank)
        assert [tile.matrix // 8 for tile in plan.left.data_hop.sums] == [rank.data_parallel] * 8


def test_qkv_of_two_groups_on_two_ranks() -> None:
    # Period: two query rows, a key row, a value row; the second rank has the second group.
    parts = (Part("query", 2), Part("key", 1), Part("value", 1))
    weight = Weight("qkv", rows=4, columns=3, partition_dim=0, tensor_parallel_size=2, parts=parts)
    assert [(m.name, m.rows, m.columns) for m in weight.matrices(DionConfig())] == [
        ("qkv[query]", 4, 3),
        ("qkv[key]", 2, 3),
        ("qkv[value]", 2, 3),
    ]
    assert rectangles(weight, 1, 2, 10) == (
        Rectangle(0, 2, 3, 2, 3, 0, cut=True),
        Rectangle(0, 3, 4, 0, 3, 1, cut=False),
        Rectangle(1, 1, 2, 0, 3, 4, cut=False),
        Rectangle(2, 1, 2, 0, 1, 7, cut=True),
    )


def test_one_group_on_more_ranks_than_groups() -> None:
    parts = (Part("query", 2), Part("key", 1), Part("value", 1))
    weight = Weight("qkv", rows=1, columns=3, partition_dim=0, tensor_parallel_size=4, parts=parts)
    held = [[(s.part, s.matrix_row) for s in weight.segments(rank)] for rank in range(4)]
    assert held == [[(0, 0)], [(0, 1)], [(1, 0)], [(2, 0)]]


def test_rows_that_are_no_whole_periods_are_refused() -> None:
    with pytest.raises(ValueError, match="10 rows are no multiple of the 4 rows of"):
        Weight("qkv", rows=10, columns=3, parts=(Part("query", 3), Part("key", 1)))
