"""What the planner says of the model itself is what runs of a tiny one do."""

from collections.abc import Sequence
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dion_tools.plan.compute import model_work
from megatron_dion_tools.plan.models import GptShape
from megatron_dion_tools.plan.stage import Optimizer, Run, Stage
from megatron_dion_tools.plan.topology import Batch, Topology
from megatron_dion_tools.plan.traffic import traffic
from tests.distributed.nursery import MODEL, TRAINING, Nursery, train
from tests.distributed.test_planned_counts import (
    MOE,
    MOE_FLAGS,
    SHAPE,
    TP2,
    counted,
    train_counted,
)

ADAM = "--optimizer adam --use-distributed-optimizer --bf16 --micro-batch-size 1".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# Flags, shape, topology and recomputation.
CASES: dict[str, tuple[str, GptShape, Topology, str]] = {
    "one process": ("", SHAPE, Topology(), "none"),
    "attention again": ("--recompute-granularity selective", SHAPE, Topology(), "selective"),
    "all again": (FULL, SHAPE, Topology(), "full"),
    "tp2": (TP2, SHAPE, Topology(tp=2), "none"),
    "pp2": ("--pipeline-model-parallel-size 2", SHAPE, Topology(pp=2), "none"),
    "ep2": (MOE_FLAGS, MOE, Topology(dp=2, ep=2), "none"),
    "ep2, tp2": (f"{MOE_FLAGS} {TP2}", MOE, Topology(tp=2, dp=2, ep=2), "none"),
    "ep2, tp2, all again": (
        f"{MOE_FLAGS} {TP2} {FULL}",
        MOE,
        Topology(tp=2, dp=2, ep=2),
        "full",
    ),
}


def count_operations(argv: Sequence[str]) -> tuple[int, float]:
    """On a rank: its stage, and the operations of products in an iteration of AdamW."""
    from megatron.core import parallel_state as state
    from megatron.training import training
    from torch.utils.flop_counter import FlopCounterMode

    found: list[tuple[int, float]] = []
    train_step = training.train_step

    @wraps(train_step)
    def counting(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = train_step(*args, **kwargs)
        found.append((state.get_pipeline_model_parallel_rank(), counter.get_total_flops()))
        return result

    training.train_step = counting
    train(argv)
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_operations(nursery: Nursery, name: str) -> None:
    """Of all ranks of a stage together: they do not have as many tokens for their experts."""
    flags, shape, topology, recompute = CASES[name]
    batch = Batch(1, 12, recompute)
    argv = [*MODEL, *TRAINING, *ADAM, "--train-iters", "1", *flags.split()]
    records = nursery.run(topology.world, count_operations, argv)
    run = Run(shape, topology, Optimizer("adamw"), bucket_size=0)
    for index in range(topology.pp):
        stage = Stage(run, index)
        work = model_work(stage, batch)
        # Megatron's local attention computes all pairs, of which the causal half counts.
        pairs = 2 * shape.sequence**2 * shape.heads * shape.head // topology.tp * len(stage.layers)
        passes = 3 + (recompute != "none")
        found = [operations for stage_of, operations in records if stage_of == index]
        planned = work.forward + work.backward + passes * pairs
        assert sum(found) == planned * batch.micro_batches(topology) * len(found)


def train_evenly(argv: Sequence[str]) -> dict[str, Any]:
    """On a rank: `train_counted`, where every expert gets as many tokens."""
    from megatron.core.transformer.moe import router

    def evenly(logits: torch.Tensor, topk: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, experts = logits.shape
        chosen = (torch.arange(tokens).unsqueeze(1) + torch.arange(topk)) % experts
        routing = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        return logits.softmax(dim=-1) * routing, routing

    router.topk_routing_with_score_function = evenly
    return train_counted(argv)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ep2")])
def test_bytes_of_tokens(nursery: Nursery, name: str) -> None:
    flags, shape, topology, recompute = CASES[name]
    argv = [*MODEL, *TRAINING, *ADAM, "--train-iters", "4", *flags.split()]
    found = traffic(
        Stage(Run(shape, topology, Optimizer("adamw"), bucket_size=0), 0), Batch(1, 12, recompute)
    )
    planned = {name: int(np.max(sent.bytes)) for name, sent in found.items()}
    for record in nursery.run(topology.world, train_evenly, argv):
        sent = counted(record)
        # A rank hands over its own tokens as well.
        others = sent["all-to-all data"] * (topology.ep - 1) // topology.ep
        assert others == planned["tokens to experts"]
        layers = planned.get("tensor-parallel activations", 0)
        of_experts = planned.get("experts' tensor parallelism", 0)
        assert sent["gather and scatter tensor"] == layers + of_experts
        summed = sum(planned.get(n, 0) for n in ("tensor-parallel loss", "gradients of parts"))
        assert 0 <= sent["all-reduce tensor"] - summed <= 64  # single numbers besides
        gathered = sent["gather data"] + sent["gather other"]
        assert gathered == planned["weights all-gather"] + planned["token counts"]
