"""The bounds are what a count of single elements says, and no plan sends less."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.sharding import Grid, Placement, Planner, Rank, Weight, traffic
from megatron_dion.sharding.balance import cut
from megatron_dion.sharding.layout import Layout as ShardedLayout
from megatron_dion.sharding.lower_bound import (
    least_bytes_of_any_schedule,
    least_bytes_of_factors,
    least_bytes_of_sharing,
)
from megatron_dion_tools.plan import PRESETS, default_bucket_size, place
from tests.unit.test_plan import Layout, for_any_layout, layouts

KINDS = ("left", "rows", "right", "gather")
LINKS = ("tensor", "data")


def exact_ring_bytes(numel_bytes: int, ranks: int) -> Fraction:
    """`ring_bytes` without its rounding down, which every rank does for itself."""
    return Fraction(2 * numel_bytes * (ranks - 1), ranks)


def sent_by_all(planner: Planner) -> Counter[str]:
    """Bytes of all ranks, by kind."""
    sent: Counter[str] = Counter()
    with mock.patch.object(traffic, "ring_bytes", exact_ring_bytes):
        for rank in planner.layout.grid.ranks():
            for plan in planner.plans(rank):
                sent.update(traffic.bytes_sent(plan))
    return sent


def of_link(sent: dict[str, int], link: str) -> int:
    return sum(size for kind, size in sent.items() if kind.startswith(link))


def elements(layout: ShardedLayout) -> list[dict[Rank, Tensor]]:
    """For each matrix and holder which elements it has; of copies, those of one."""
    found: list[dict[Rank, Tensor]] = [{} for _ in layout.matrices]
    for index in range(len(layout.placements)):
        for rank in layout.grid.ranks():
            if layout.is_duplicated(index) and rank.tensor_parallel:
                continue
            for held in layout.held(index, rank):
                matrix, r = layout.matrices[held.matrix], held.rectangle
                empty = torch.zeros(matrix.rows, matrix.columns, dtype=torch.int64)
                mine = found[held.matrix].setdefault(rank, empty)
                mine[r.row_start : r.row_stop, r.column_start : r.column_stop] = 1
    return found


def by_group(by_rank: dict[Rank, Tensor]) -> list[Tensor]:
    groups: dict[int, Tensor] = {}
    for rank, mask in by_rank.items():
        groups[rank.data_parallel] = groups.get(rank.data_parallel, torch.zeros_like(mask)) + mask
    return list(groups.values())


def surplus(masks: list[Tensor], dim: int, most: int) -> int:
    """Rows of each column, or the reverse, of all holders but the one that has most."""
    heights = torch.stack([mask.sum(dim).clamp(max=most) for mask in masks])
    return int(heights.sum() - heights.amax(0).sum())


@given(layouts())
@for_any_layout
def test_bounds_of_factors_by_element(layout: Layout) -> None:
    planner = layout.planner
    bound = least_bytes_of_factors(planner.layout)
    rows: Counter[str] = Counter()
    norms: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for matrix, by_rank in zip(layout.matrices, elements(planner.layout), strict=True):
        for name, masks in (("all", list(by_rank.values())), ("data", by_group(by_rank))):
            widest = max(int((mask.sum(0) > 0).sum()) for mask in masks)
            # Row i of a triangle has r - i numbers; the widest holder has its rows itself.
            elsewhere = sum(
                max(matrix.rank - row % widest, 0) for row in range(widest, matrix.columns)
            )
            left[name] += 8 * (matrix.rank * surplus(masks, 0, 1) + elsewhere)
            rows[name] += 8 * matrix.rank * surplus(masks, 1, 1)
            norms[name] += 16 * matrix.rank * (len(masks) - 1)
    for kind, found in (("left", left), ("rows", rows), ("right", norms)):
        assert bound[f"tensor {kind}"] + bound[f"data {kind}"] == found["all"]
        assert bound[f"data {kind}"] == found["data"]


@given(layouts())
@for_any_layout
def test_bounds_of_any_schedule_by_element(layout: Layout) -> None:
    found: Counter[str] = Counter()
    for matrix, by_rank in zip(layout.matrices, elements(layout.planner.layout), strict=True):
        for name, masks in (("all", list(by_rank.values())), ("data", by_group(by_rank))):
            left, rows = (surplus(masks, dim, matrix.rank) for dim in (0, 1))
            found[name] += 8 * max(left, rows)
            if all(thick(mask, matrix.rank) for mask in masks):
                found[name] += 8 * min(left, rows)
    every, far = least_bytes_of_any_schedule(layout.planner.layout)
    assert (every, far) == (found["all"], found["data"])


def thick(mask: Tensor, rank: int) -> bool:
    heights, widths = mask.sum(0), mask.sum(1)
    sums = heights.clamp(max=rank).sum() + widths.clamp(max=rank).sum()
    return bool(heights[heights > 0].min() >= rank and sums <= mask.sum())


@given(layouts())
@for_any_layout
def test_no_plan_sends_less(layout: Layout) -> None:
    if layout.config.right_factor == "orth":  # sends Gram matrices in place of norms
        return
    sent = sent_by_all(layout.planner)
    bound = least_bytes_of_factors(layout.planner.layout)
    every, far = least_bytes_of_any_schedule(layout.planner.layout)
    sharing = least_bytes_of_sharing(layout.planner.layout, layout.planner.charges)
    assert far <= every <= sum(bound.values())
    assert far <= of_link(bound, "data")
    assert sum(bound.values()) + sum(sharing.values()) <= sum(sent.values())
    assert of_link(bound, "data") + sharing["data parts"] <= of_link(sent, "data")
    for kind in KINDS:
        assert sum(bound.get(f"{link} {kind}", 0) for link in LINKS) <= sum(
            sent.get(f"{link} {kind}", 0) + (kind == "left") * sent.get(f"{link} parts", 0)
            for link in LINKS
        )


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
@for_any_layout
def test_whole_matrices_need_nothing(ranks: int, rows: int, columns: int) -> None:
    weights = [Weight(f"weight{i}", rows, columns) for i in range(ranks)]
    numel = rows * columns
    placements = [Placement(w, i * numel, ranks * numel) for i, w in enumerate(weights)]
    layout = ShardedLayout(placements, Grid(1, ranks), DionConfig())
    assert not any(least_bytes_of_factors(layout).values())
    assert least_bytes_of_any_schedule(layout) == (0, 0)


def test_a_matrix_cut_by_hand() -> None:
    """40 x 12, rank 3, rows over four ranks of ten: 2 x 3 x 12 x 3 numbers, and 3 norms."""
    placement = Placement(Weight("weight", 40, 12), 0, 480)
    layout = ShardedLayout([placement], Grid(1, 4), DionConfig(rank_fraction=0.25))
    bound = least_bytes_of_factors(layout)
    assert {kind: size for kind, size in bound.items() if size} == {
        "data left": 4 * 2 * 3 * 12 * 3,
        "data right": 8 * 2 * 3 * 3,
    }
    assert least_bytes_of_any_schedule(layout) == (4 * 2 * 3 * 12 * 3,) * 2


def test_shared_p_by_hand() -> None:
    """A triangle of rank 8 has 36 numbers, which all ranks but one send and get back."""
    grid = Grid(2, 3)
    placement = Placement(Weight("w", 32, 120, 0, 2), 0, 32 * 120)
    config = DionConfig(rank_fraction=1 / 8)
    layout = ShardedLayout([placement], grid, config)
    triangle = 4 * 2 * 36

    def sharing(layout: ShardedLayout, ranks: list[Rank]) -> tuple[int, int]:
        found = least_bytes_of_sharing(layout, {0: cut(0, 120, ranks)})
        return found["tensor parts"], found["data parts"]

    assert layout.matrices[0].rank == 8
    assert sharing(layout, [Rank()]) == (0, 0)
    assert sharing(layout, grid.tensor_group(Rank())) == (triangle, 0)
    assert sharing(layout, sorted(grid.ranks())) == (3 * triangle, 2 * triangle)
    assert sharing(layout, [Rank(0, 0), Rank(1, 1)]) == (0, triangle)
    # Of a row-parallel weight a tensor-parallel group's triangles belong to the factors' bound.
    rows = replace(placement, weight=Weight("w", 64, 60, 1, 2))
    layout = ShardedLayout([rows], grid, config)
    assert sharing(layout, grid.tensor_group(Rank())) == (0, 0)
    assert sharing(layout, sorted(grid.ranks())) == (2 * triangle, 2 * triangle)


def test_slivers_cost_no_more_than_their_rows() -> None:
    """Ranks with two rows each and rank 3: sending them is less than sending parts of P."""
    placement = Placement(Weight("weight", 12, 12), 0, 144)
    layout = ShardedLayout([placement], Grid(1, 6), DionConfig(rank_fraction=0.25))
    assert least_bytes_of_factors(layout)["data left"] == 4 * 2 * 5 * 12 * 3
    assert least_bytes_of_any_schedule(layout) == (4 * 2 * 5 * 12 * 2,) * 2


@pytest.mark.parametrize("dp", [8, 64])
@pytest.mark.parametrize("one_bucket", [True, False])
@pytest.mark.parametrize("fraction", [1 / 4, 1 / 16])
def test_undivided_8b_sends_what_it_must(dp: int, one_bucket: bool, fraction: float) -> None:
    shape = PRESETS["8B"]
    placements = place(
        shape.weights(range(shape.layers)), dp, None if one_bucket else default_bucket_size(dp)
    )
    planner = Planner(placements, Grid(1, dp), DionConfig(rank_fraction=fraction))
    assert not any(len(charges) > 1 for charges in planner.charges.values())
    sent, bound = sent_by_all(planner), least_bytes_of_factors(planner.layout)
    assert sent == Counter(bound)


def test_matrices_held_whole_send_nothing() -> None:
    weights = [Weight(f"w{i}", 16, 8) for i in range(4)]
    placements = [Placement(w, i * 128, 512) for i, w in enumerate(weights)]
    sets = [[0, 2], [1, 3]]
    config = DionConfig(orthonormalizer="qr")  # which is never divided
    assert not any(sent_by_all(Planner(placements, Grid(1, 4), config, sets)).values())
    assert sent_by_all(Planner(placements, Grid(1, 8), config, sets))["data right"]
