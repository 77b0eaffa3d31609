"""Properties of plans for any shapes, fusions, buckets and grids, without a process."""

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dion import DionConfig
from megatron_dion.sharding import Grid, Part, Placement, Plan, Rank, Rectangle, Weight, make_plan
from megatron_dion.sharding.blocks import rectangles

sizes = st.integers(1, 12)


@st.composite
def weights(draw: st.DrawFn, tp: int, name: str) -> Weight:
    dim = draw(st.sampled_from([0, 1, None])) if tp > 1 else None
    periods = draw(st.integers(1, 3)) * (tp if dim == 0 else 1)
    parts = tuple(Part(f"part{i}", draw(sizes)) for i in range(draw(st.integers(1, 3))))
    rows = periods * sum(part.rows for part in parts) // (tp if dim == 0 else 1)
    return Weight(name, rows, draw(sizes), dim, tp, parts, separate_periods=draw(st.booleans()))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Placement], Grid]:
    grid = Grid(draw(st.integers(1, 3)), draw(st.integers(1, 6)))
    placements: list[Placement] = []
    for bucket in range(draw(st.integers(1, 2))):
        members, position = [], 0
        for index in range(draw(st.integers(1, 3))):
            weight = draw(weights(grid.tensor_parallel_size, f"weight{bucket}.{index}"))
            members.append((weight, position))
            position += weight.rows * weight.columns + draw(st.integers(0, 5))
        numel = math.ceil(position / grid.data_parallel_size) * grid.data_parallel_size
        placements += [Placement(weight, start, numel) for weight, start in members]
    return placements, grid


def ranks(grid: Grid) -> list[Rank]:
    sizes = (range(grid.tensor_parallel_size), range(grid.data_parallel_size))
    return [Rank(t, d) for t, d in product(*sizes)]


def plans(placements: list[Placement], grid: Grid) -> dict[Rank, Plan]:
    config = DionConfig(rank_fraction=0.5)
    return {rank: make_plan(placements, grid, rank, config) for rank in ranks(grid)}


@given(layouts())
@settings(deadline=None)
def test_every_element_lies_in_one_rectangle(layout: tuple[list[Placement], Grid]) -> None:
    placements, grid = layout
    every = plans(placements, grid)
    matrices = every[Rank()].matrices
    count = [torch.zeros(matrix.rows, matrix.columns, dtype=torch.int) for matrix in matrices]
    for plan in every.values():
        for first, piece in zip(plan.first_matrix, plan.pieces, strict=True):
            for r in piece:
                rows, columns = slice(r.row_start, r.row_stop), slice(r.column_start, r.column_stop)
                count[first + r.part][rows, columns] += 1
    for index, placement in enumerate(placements):
        copies = grid.tensor_parallel_size if placement.weight.partition_dim is None else 1
        first = every[Rank()].first_matrix[index]
        for offset in range(len(placement.weight.matrices(DionConfig()))):
            assert (count[first + offset] == copies).all()


@given(layouts())
@settings(deadline=None)
def test_rectangles_are_consecutive_in_memory(layout: tuple[list[Placement], Grid]) -> None:
    placements, grid = layout
    for rank, plan in plans(placements, grid).items():
        for placement, piece in zip(placements, plan.pieces, strict=True):
            start, stop = placement.piece(rank.data_parallel, grid.data_parallel_size)
            offset = 0
            for rectangle in piece:
                assert rectangle.offset == offset
                offset += rectangle.numel
            assert offset == stop - start


@given(layouts())
@settings(deadline=None)
def test_what_is_sent_is_received(layout: tuple[list[Placement], Grid]) -> None:
    placements, grid = layout
    every = plans(placements, grid)
    for rank, plan in every.items():
        for t in range(grid.tensor_parallel_size):
            peer = every[replace(rank, tensor_parallel=t)]
            assert plan.tensor_hop.sends[t] == peer.tensor_hop.receives[rank.tensor_parallel]
        for d in range(grid.data_parallel_size):
            peer = every[replace(rank, data_parallel=d)]
            assert plan.data_hop.sends[d] == peer.data_hop.receives[rank.data_parallel]
            assert plan.shared_rows[d] == peer.shared_rows[rank.data_parallel]


@given(layouts())
@settings(deadline=None)
def test_hops_fit_each_other(layout: tuple[list[Placement], Grid]) -> None:
    for plan in plans(*layout).values():
        # The second hop sends from the memory into which the first one sums.
        assert plan.data_hop.tiles == plan.tensor_hop.sums


@given(layouts())
@settings(deadline=None)
def test_every_matrix_is_decided_once_from_all_its_elements(
    layout: tuple[list[Placement], Grid],
) -> None:
    placements, grid = layout
    every = plans(placements, grid)
    matrices = every[Rank()].matrices
    decided = Counter(tile.matrix for plan in every.values() for tile in plan.data_hop.sums)
    for index, placement in enumerate(placements):
        copies = grid.tensor_parallel_size if placement.weight.partition_dim is None else 1
        first = every[Rank()].first_matrix[index]
        for matrix in range(first, first + len(placement.weight.matrices(DionConfig()))):
            assert decided[matrix] == copies
    for plan in every.values():
        for tile in plan.data_hop.sums:
            assert (tile.start, tile.stop) == (0, matrices[tile.matrix].columns)
            arriving = [t for tiles in plan.data_hop.receives for t in tiles]
            rows = {
                row for t in arriving if t.matrix == tile.matrix for row in range(t.start, t.stop)
            }
            assert rows == set(range(tile.stop))


@given(layouts())
@settings(deadline=None)
def test_rows_in_several_pieces_are_shared_rows(layout: tuple[list[Placement], Grid]) -> None:
    placements, grid = layout
    every = plans(placements, grid)
    for rank, plan in every.items():
        mine = {(row.matrix, row.row) for peer in plan.shared_rows for row in peer}
        cut = {
            (first + r.part, r.row_start)
            for first, piece in zip(plan.first_matrix, plan.pieces, strict=True)
            for r in piece
            if r.cut
        }
        assert mine == cut, rank


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


def test_charges_are_balanced() -> None:
    weight = Weight("w", 256, 256)
    placements = [
        Placement(replace(weight, name=f"w{i}"), i * 256 * 256, 32 * 256 * 256) for i in range(32)
    ]
    # Each of four ranks holds eight whole matrices and must decide those.
    for plan in plans(placements, Grid(1, 4)).values():
        assert len(plan.data_hop.sums) == 8
