"""Planned layouts are those of Megatron: of runs of a tiny model, and of large ones' shapes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dion import Dion
from megatron_dion.optimizer.binding import Distribution
from megatron_dion.sharding import Placement
from megatron_dion_tools.plan import PRESETS, GptShape, default_bucket_size, place
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, train

# What MODEL says.
SHAPE = GptShape(layers=4, hidden=72, ffn=200, heads=4, query_groups=2, kv_channels=18)
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size"
# linear_fc2 and linear_fc1 of one rank fill a bucket exactly.
EXACT = 3 * 200 * 72
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"


def train_placed(argv: Sequence[str]) -> list[tuple[int, list[Placement]]]:
    """On a rank: for each Dion optimizer its pipeline stage and its placements."""
    from megatron.core import parallel_state

    found = []
    distribute = Dion.distribute

    def recorded(self: Dion, distribution: Distribution) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        found.append((stage, list(distribution.placements)))
        distribute(self, distribution)

    Dion.distribute = recorded
    train(argv)
    return found


@pytest.mark.parametrize(
    ("flags", "bucket_size", "tp", "dp", "pp"),
    [
        pytest.param("", None, 1, 2, 1, marks=pytest.mark.slow),
        pytest.param("--micro-batch-size 2", EXACT, 1, 3, 1, marks=pytest.mark.slow),
        (TP2, 20000, 2, 2, 1),
        pytest.param(PP2, 20000, 1, 2, 2, marks=pytest.mark.slow),
    ],
    ids=["dp2", "dp3-overlap", "tp2-dp2-overlap", "pp2-dp2-overlap"],
)
def test_placements_of_a_run(
    nursery: Nursery,
    tmp_path: Path,
    flags: str,
    bucket_size: int | None,
    tp: int,
    dp: int,
    pp: int,
) -> None:
    argv = [*MODEL, *TRAINING, *DION, "--train-iters", "1", "--run-dir", str(tmp_path)]
    argv += flags.split() if bucket_size is None else f"{flags} {OVERLAP} {bucket_size}".split()
    records = nursery.run(tp * dp * pp, train_placed, argv)
    assert [stage for ((stage, _),) in records] == sorted([*range(pp)] * (tp * dp))
    for ((stage, found),) in records:
        weights = SHAPE.weights(SHAPE.stage_layers(pp, stage), tp)
        planned = place(weights, dp, bucket_size if stage == 0 else None)
        assert found == planned
        buckets = [placement for placement in planned if placement.start == 0]
        assert (len(buckets) > 2) == (bucket_size is not None and stage == 0)


@pytest.mark.slow
def test_heads_of_any_width_more_ranks_than_query_groups_and_no_gate(
    nursery: Nursery, tmp_path: Path
) -> None:
    model = [word for word in MODEL if word != "--swiglu"]
    argv = [*model, *TRAINING, *DION, "--train-iters", "1", "--run-dir", str(tmp_path)]
    flags = "--tensor-model-parallel-size 4 --kv-channels 20".split()
    shape = replace(SHAPE, kv_channels=20, gated=False)
    planned = place(shape.weights(range(4), 4), 1, None)
    assert nursery.run(4, train_placed, [*argv, *flags]) == [[(0, planned)]] * 4


def megatron_layout(
    shapes: list[tuple[int, int]], data_parallel_size: int
) -> list[tuple[int, int]]:
    """On a rank: each parameter's start and bucket's size, buckets of Megatron's own choice."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.training.training import resolve_ddp_bucket_size

    dist.init_process_group("fake", rank=0, world_size=data_parallel_size, store=FakeStore())
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    bucket_size = resolve_ddp_bucket_size(config, dist.group.WORLD, True, 0)
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    layout = DistributedOptimizer._compute_per_buffer_param_layout(
        parameters, bucket_size, data_parallel_size, config
    )
    ranges = [layout.bucket_indices[bucket] for _, _, bucket in layout.param_index_map.values()]
    starts = [start for start, _, _ in layout.param_index_map.values()]
    return [(start - a, b - a) for start, (a, b) in zip(starts, ranges, strict=True)]


@pytest.mark.parametrize(
    ("preset", "pp", "tp", "dp"),
    [("8B", 1, 1, 8), ("70B", 4, 8, 1000), ("405B", 16, 8, 96)],
)
def test_placements_of_large_models(
    nursery: Nursery, preset: str, pp: int, tp: int, dp: int
) -> None:
    shape = PRESETS[preset]
    weights = shape.weights(shape.stage_layers(pp, 0), tp)
    planned = place(weights, dp, default_bucket_size(dp))
    shapes = [(weight.rows, weight.columns) for weight in weights]
    (found,) = nursery.run(1, megatron_layout, shapes, dp)
    assert found == [(placement.start, placement.bucket_numel) for placement in planned]
