"""Planned layouts of large models are those of Megatron; of runs, test_planned_counts.py."""

import contextlib
import io
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dion_tools.plan import PRESETS, place
from megatron_dion_tools.plan.stage import Optimizer, Run, Stage
from megatron_dion_tools.plan.topology import Topology
from tests.distributed.tiny_gpt import DION, MODEL, TRAINING
from tests.worlds import train, world


def megatron_layout(
    shapes: list[tuple[int, int]], data_parallel_size: int, is_dion: bool, size: int | None
) -> list[tuple[int, int]]:
    """On a rank: each parameter's start and bucket's size, as the user's size or none makes it."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.training.training import resolve_ddp_bucket_size

    from megatron_dion.megatron import hooks
    from megatron_dion.optimizer.routing import ROUTE_TAG

    dist.init_process_group("fake", rank=0, world_size=data_parallel_size, store=FakeStore())
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, bucket_size=size)
    bucket_size = resolve_ddp_bucket_size(config, dist.group.WORLD, True, 0)
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    for parameter in parameters:
        setattr(parameter, ROUTE_TAG, SimpleNamespace(weight=is_dion or None))
    hooks.TrainingHooks("cpu", script_is_ours=True).install()
    args = SimpleNamespace(ddp_bucket_size=size, ddp_num_buckets=None)
    with mock.patch.object(hooks, "get_args", return_value=args):
        layout = DistributedOptimizer._compute_per_buffer_param_layout(
            parameters, bucket_size, data_parallel_size, config
        )
    ranges = [layout.bucket_indices[bucket] for _, _, bucket in layout.param_index_map.values()]
    starts = [start for start, _, _ in layout.param_index_map.values()]
    return [(start - a, b - a) for start, (a, b) in zip(starts, ranges, strict=True)]


@pytest.mark.parametrize(
    ("preset", "optimizer", "sizes", "size", "buckets"),
    [
        ("8B", "adamw", (1, 1, 8), None, 96),
        ("8B", "dion", (2, 1, 8), None, 8),
        ("8B", "dion", (2, 1, 8), 40_000_000, 64),
        ("70B", "dion", (8, 4, 1000), None, 3),
        ("405B", "dion", (8, 16, 96), None, 8),
    ],
)
def test_placements_of_large_models(
    preset: str, optimizer: str, sizes: list[int], size: int | None, buckets: int
) -> None:
    dp = sizes[-1]
    run = Run(PRESETS[preset], Topology(*sizes), Optimizer(optimizer), size, global_batch=dp)
    stage = Stage(run, 0)
    planned = place(stage.weights, dp, stage.bucket_size)
    shapes = [(weight.rows, weight.columns) for weight in stage.weights]
    (found,) = world(1).fork(megatron_layout, shapes, dp, optimizer == "dion", size)
    assert found == [(placement.start, placement.bucket_numel) for placement in planned]
    assert sum(start == 0 for start, _ in found) == buckets


def buckets_of_a_run(flags: list[str]) -> tuple[list[int], str]:
    """On a rank: the number of buckets of Dion's and of the other buffer; what the run said.

    The tiny model's matrices would fit into one bucket of any default, so a quarter is forced.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_dion.megatron import hooks

    buckets: list[int] = []
    init = DistributedOptimizer.__init__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        buckets.extend(len(buffer.buckets) for buffer in self.buffers)

    with (
        mock.patch.object(DistributedOptimizer, "__init__", recorded),
        mock.patch.object(hooks, "dion_bucket_size", lambda elements, usual: elements // 4),
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        train([*MODEL, *TRAINING, *DION, "--train-iters", "1", "--overlap-grad-reduce", *flags])
    return buckets, said.getvalue()


def test_a_run_chooses_buckets_for_matrices_alone() -> None:
    [(buckets, said)] = world(1).fork(buckets_of_a_run, [])
    assert sorted(buckets) == [1, 4]
    assert "[dion] gradients of Dion's matrices: --ddp-bucket-size " in said
    [(buckets, said)] = world(1).fork(buckets_of_a_run, ["--ddp-bucket-size", "1000000000"])
    assert buckets == [1, 1]
    assert "--ddp-bucket-size" not in said
