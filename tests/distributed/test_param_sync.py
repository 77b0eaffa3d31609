"""After a step all data-parallel ranks have the same parameters, also where buckets are grouped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.distributed.tiny_gpt import DION, MODEL, TRAINING, losses, pretrain
from tests.worlds import train, world

VPP = (
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --train-iters 4"
).split()


def train_grouped(dion_first: bool, argv: Sequence[str]) -> list[dict[str, Tensor]]:
    """On a rank: trains; returns its parameters.

    Megatron puts all buckets of a later model chunk into one group. Which optimizer's come first
    depends on the order of a layer's parameters, which is another one with Transformer Engine.
    """
    from megatron.core.distributed import distributed_data_parallel as ddp
    from megatron.training import training

    partition, setup = ddp.partition_buckets, training.setup_model_and_optimizer
    models: list[Any] = []

    def sorted_partition(buffers: Sequence[Any], **options: Any) -> Any:
        tagged = [b.params[0].is_managed_by_layer_wise_optimizer == dion_first for b in buffers]
        order = sorted(zip(tagged, buffers, strict=True), key=lambda pair: not pair[0])
        return partition([buffer for _, buffer in order], **options)

    def keep_model(*args: Any, **options: Any) -> Any:
        result = setup(*args, **options)
        models.extend(result[0])
        return result

    with (
        mock.patch.object(ddp, "partition_buckets", sorted_partition),
        mock.patch.object(training, "setup_model_and_optimizer", keep_model),
    ):
        train(argv)
    return [{n: p.detach().clone() for n, p in chunk.named_parameters()} for chunk in models]


def test_all_data_parallel_ranks_have_equal_parameters_in_either_order(tmp_path: Path) -> None:
    found = []
    for dion_first in (False, True):
        folder = tmp_path / str(dion_first)
        argv = [*MODEL, *TRAINING, *DION, *VPP, "--run-dir", str(folder)]
        records = world(4).fork(train_grouped, dion_first, argv)
        found.append(losses(folder))
        for one, other in ((0, 1), (2, 3)):  # of a pipeline stage
            for here, there in zip(records[one], records[other], strict=True):
                assert all(torch.equal(here[name], there[name]) for name in here)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("rank_fraction", "whole"),
    [
        ("0.6", {"linear_proj", "linear_qkv"}),  # nearly square, so that (m + n) r > m n
        ("1", {"linear_proj", "linear_qkv", "linear_fc1", "linear_fc2"}),
    ],
)
def test_what_is_not_compressed_is_named(
    tmp_path: Path, rank_fraction: str, whole: set[str]
) -> None:
    argv = [*DION, *"--train-iters 2 --dion-compressed-sync --run-dir".split(), str(tmp_path)]
    argv += ["--num-distributed-optimizer-instances", "2", "--dion-rank-fraction", rank_fraction]
    pretrain(2, *argv)
    lines = (tmp_path / "routing.tsv").read_text().splitlines()
    assert {row.split("\t")[0].split(".")[-2] for row in lines if "averaged over" in row} == whole
