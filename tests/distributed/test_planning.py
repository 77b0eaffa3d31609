"""Planned layouts of large models are those of Megatron; of runs, test_planned_counts.py."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dion_tools.plan import PRESETS, default_bucket_size, place
from tests.distributed.nursery import Nursery


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
