"""A gradient element that is not finite, on one rank: nothing of it enters the state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dion import Dion
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, read_metrics, train
from tests.distributed.world import RankError

BROKEN_STEP = 3
TP2_DP2 = "--tensor-model-parallel-size 2 --sequence-parallel --train-iters 6".split()
NO_CHECK = "--no-check-for-nan-in-loss-and-grad"


def train_with_fault(value: float, argv: Sequence[str]) -> list[float]:
    """On a rank: breaks a gradient before one step; returns norms of Dion's state after each.

    Only the last rank breaks, in a piece of a matrix that it holds.
    """
    from megatron_dion.optimizer.factory import DionChainedOptimizer

    calls = 0
    norms: list[float] = []
    step = DionChainedOptimizer.step

    def broken_step(self: DionChainedOptimizer) -> Any:
        nonlocal calls
        calls += 1
        if calls == BROKEN_STEP and torch.distributed.get_rank() == 3:
            optimizer = self.chained_optimizers[0]
            piece = optimizer.gbuf_ranges[0]
            [(_, buckets)] = piece.items()
            parameter, ranges = next(iter(buckets[0]["param_map"].items()))
            parameter.main_grad.view(-1)[ranges["param"].start] = value
        result = step(self)
        dion: Dion = self.chained_optimizers[0].optimizer
        norms.append(sum(float(s["momentum"].norm()) for s in dion.state.values()))
        return result

    DionChainedOptimizer.step = broken_step
    train([*MODEL, *TRAINING, *DION, *TP2_DP2, *argv])
    return norms


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_error_names_the_parameter(nursery: Nursery, value: float) -> None:
    with pytest.raises(RankError, match=r"gradient is not finite: decoder\.layers\.\d+\."):
        nursery.run(4, train_with_fault, value, [NO_CHECK])


def test_loss_scaler_skips_the_step(nursery: Nursery, tmp_path: Path) -> None:
    argv = ["--fp16", "--initial-loss-scale", "4096", "--run-dir", str(tmp_path)]
    for norms in nursery.run(4, train_with_fault, torch.nan, argv):
        assert len(norms) == 6
        assert norms[BROKEN_STEP - 1] == norms[BROKEN_STEP - 2]  # the skipped step changed nothing
        assert all(torch.tensor(norms).isfinite())
        assert len(set(norms)) == 5
    metrics = read_metrics(tmp_path)
    assert [entry["skipped"] for entry in metrics] == [i == BROKEN_STEP for i in range(1, 7)]
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]
