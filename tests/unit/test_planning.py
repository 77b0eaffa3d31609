"""Shapes and layouts for any sizes; tests/distributed has the comparison with Megatron."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dion import DionConfig
from megatron_dion.sharding import Placement, Weight
from megatron_dion_tools.plan import PRESETS, GptShape, default_bucket_size, place

TINY = GptShape(layers=6, hidden=24, ffn=40, heads=8, query_groups=4)
sizes = st.integers(1, 40)
weight_lists = st.lists(st.builds(Weight, st.sampled_from("abc"), sizes, sizes), max_size=20)
bucket_sizes = st.none() | st.integers(1, 4000)


def end(placement: Placement) -> int:
    return placement.start + placement.weight.rows * placement.weight.columns


def buckets(placements: list[Placement]) -> list[list[Placement]]:
    """Only a bucket's first weight starts at its start."""
    firsts = [index for index, placement in enumerate(placements) if placement.start == 0]
    return [placements[a:b] for a, b in pairwise([*firsts, len(placements)])]


@given(weight_lists, st.integers(1, 300), bucket_sizes)
def test_weights_lie_in_reverse_order_as_close_as_alignment_allows(
    weights: list[Weight], data_parallel_size: int, bucket_size: int | None
) -> None:
    placements = place(weights, data_parallel_size, bucket_size)
    assert [placement.weight for placement in placements] == weights[::-1]
    for bucket in buckets(placements):
        for before, after in pairwise(bucket):
            assert after.start % 64 == 0
            assert 0 <= after.start - end(before) < 64


@given(weight_lists, st.integers(1, 300), bucket_sizes)
def test_buckets_are_cut_evenly_and_padded_no_further(
    weights: list[Weight], data_parallel_size: int, bucket_size: int | None
) -> None:
    for bucket in buckets(place(weights, data_parallel_size, bucket_size)):
        (numel,) = {placement.bucket_numel for placement in bucket}
        assert numel % data_parallel_size == numel % 128 == 0
        assert 0 <= numel - end(bucket[-1]) < math.lcm(data_parallel_size, 128)


@given(weight_lists, st.integers(1, 4000))
def test_a_bucket_ends_with_the_weight_that_fills_it(
    weights: list[Weight], bucket_size: int
) -> None:
    found = buckets(place(weights, 2, bucket_size))
    assert all(end(bucket[-1]) >= bucket_size for bucket in found[:-1])
    assert all(end(placement) < bucket_size for bucket in found for placement in bucket[:-1])


@given(weight_lists)
def test_one_bucket_without_a_bucket_size(weights: list[Weight]) -> None:
    assert len(buckets(place(weights, 2, None))) == min(len(weights), 1)


@pytest.mark.parametrize(
    ("data_parallel_size", "stage", "expected"),
    [(1, 0, 40_000_000), (40, 0, 40_000_000), (1024, 0, 1_024_000_000), (1024, 1, None)],
)
def test_default_bucket_size(data_parallel_size: int, stage: int, expected: int | None) -> None:
    assert default_bucket_size(data_parallel_size, stage) == expected


@pytest.mark.parametrize("size", [2, 4, 8])
def test_logical_matrices_do_not_depend_on_tensor_parallelism(size: int) -> None:
    config = DionConfig(rank_fraction=0.5)
    alone, shared = TINY.weights(range(6)), TINY.weights(range(6), size)
    for whole, sharded in zip(alone, shared, strict=True):
        assert sharded.matrices(config) == whole.matrices(config)
        assert sharded.rows * sharded.columns * size == whole.rows * whole.columns


def test_matrices_of_a_layer() -> None:
    found = [m for weight in TINY.weights([3]) for m in weight.matrices(DionConfig())]
    layer = "decoder.layers.3"
    assert [(matrix.name, matrix.rows, matrix.columns) for matrix in found] == [
        (f"{layer}.self_attention.linear_proj.weight", 24, 24),
        (f"{layer}.self_attention.linear_qkv.weight[query]", 24, 24),
        (f"{layer}.self_attention.linear_qkv.weight[key]", 12, 24),
        (f"{layer}.self_attention.linear_qkv.weight[value]", 12, 24),
        (f"{layer}.mlp.linear_fc1.weight[gate]", 40, 24),
        (f"{layer}.mlp.linear_fc1.weight[up]", 40, 24),
        (f"{layer}.mlp.linear_fc2.weight", 24, 40),
    ]


def test_width_of_heads_and_gate_are_free() -> None:
    shape = GptShape(1, 24, 40, 8, 2, kv_channels=5, gated=False)
    found = [(weight.rows, weight.columns) for weight in shape.weights([0])]
    assert found == [(24, 40), (60, 24), (40, 24), (24, 40)]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_stages_share_the_layers(size: int) -> None:
    stages = [TINY.stage_layers(size, stage) for stage in range(size)]
    assert [layer for stage in stages for layer in stage] == list(range(6))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("8B", 8_030_261_248), ("70B", 70_553_706_496), ("405B", 405_853_388_800)],
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    assert PRESETS[name].parameters == parameters


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="--num-attention-heads 4 does not divide --hidden-size 10: take 2 or 5"
    ):
        GptShape(1, 10, 8, 4, 2)
    with pytest.raises(
        ValueError, match="--num-query-groups 3 does not divide --num-attention-heads 4"
    ):
        GptShape(1, 8, 8, 4, 3)
    with pytest.raises(
        ValueError, match="--tp 3 does not divide the model's 8 attention heads: take 1, 2, 4 or 8"
    ):
        TINY.weights([0], 3)
    with pytest.raises(
        ValueError,
        match="--tp 16 does not divide the model's 40 columns of its feed-forward layer: take 1,",
    ):
        GptShape(1, 32, 40, 16, 16).weights([0], 16)
    with pytest.raises(
        ValueError, match="--tp 4 does not divide the model's 6 query groups: take 1 or 2"
    ):
        GptShape(1, 24, 40, 12, 6).weights([0], 4)
    with pytest.raises(
        ValueError, match="--pp 4 does not divide the model's 6 layers: take 3 or 6"
    ):
        TINY.stage_layers(4, 0)
    with pytest.raises(ValueError, match="stage 2 is none of 2"):
        TINY.stage_layers(2, 2)
