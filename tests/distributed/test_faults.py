"""A gradient element that is not finite, on one rank: nothing of it enters the state."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dion import Dion
from tests.distributed.recording import frame
from tests.distributed.tiny_gpt import DION, INSTANCES, MODEL, TP2, TRAINING, losses, records_of
from tests.worlds import RankError, train, world

BROKEN_STEP = 3
FP16 = "--fp16 --initial-loss-scale 4096".split()
NO_CHECK = "--no-check-for-nan-in-loss-and-grad"
State = tuple[float, ...]


def train_with_fault(
    value: float | None, argv: Sequence[str], broken: int = 0, threshold: float = torch.inf
) -> list[State]:
    """On a rank: breaks a gradient before one step, or leaves the step out if the value is None.

    Only the last rank breaks, in a piece of a matrix that it holds, or of what another optimizer
    of the chain holds. Steps are skipped where the norm is over the threshold. Returns norms of
    momenta and weights after each step.
    """
    from megatron_dion.optimizer.chain import DionChainedOptimizer
    from megatron_dion.optimizer.checkpoint import flat_states

    calls = 0
    norms: list[State] = []
    step = DionChainedOptimizer.step

    def broken_step(self: DionChainedOptimizer) -> Any:
        nonlocal calls
        calls += 1
        if calls == BROKEN_STEP and value is not None and torch.distributed.get_rank() == 3:
            held = flat_states(self.chained_optimizers[broken])
            # Of weights that all tensor-parallel ranks have, the norm takes one copy.
            parameter, start = next((p, at) for p, at, *_ in held if p.tensor_model_parallel)
            parameter.main_grad.view(-1)[start] = value
        self.config.grad_norm_skip_threshold = threshold
        skips = calls == BROKEN_STEP and value is None
        result = (False, None, None) if skips else step(self)
        dion: Dion = self.chained_optimizers[0].optimizer
        momenta = [state["momentum"] for state in dion.state.values()]
        weights = [values for *_, values in frame(dion)]
        norms.append(tuple(sum(float(t.norm()) for t in kind) for kind in (momenta, weights)))
        return result

    DionChainedOptimizer.step = broken_step
    train([*MODEL, *TRAINING, *DION, "--num-layers", "2", "--train-iters", "6", *argv])
    return norms


@pytest.mark.parametrize(
    ("value", "broken", "named"),
    [
        (torch.inf, 0, r"decoder\.layers\.\d+\.[\w.]+weight$"),
        (torch.nan, 1, r"(embedding|output_layer)\.[\w.]*weight$"),
        (1e30, 0, "the norm of all together is inf$"),
    ],
)
def test_error_names_the_parameter(value: float, broken: int, named: str) -> None:
    with pytest.raises(RankError, match=re.compile(f"gradient is not finite: {named}", re.M)):
        world(4).fork(train_with_fault, value, [*TP2.split(), NO_CHECK], broken)


def test_threshold_skips_the_step() -> None:
    for norms in world(4).fork(train_with_fault, 1e30, [*TP2.split(), NO_CHECK], 0, 1e9):
        assert norms[BROKEN_STEP - 1] == norms[BROKEN_STEP - 2]
        assert len(set(norms)) == 5


def test_loss_scaler_skips_the_step(tmp_path: Path) -> None:
    argv = [*INSTANCES.split(), "--dion-compressed-sync", *FP16]
    found = [*argv, "--run-dir", str(tmp_path / "found")]
    records = world(4).fork(train_with_fault, torch.nan, found)
    for norms in records:
        assert len(norms) == 6
        assert norms[BROKEN_STEP - 1] == norms[BROKEN_STEP - 2]  # the skipped step changed nothing
        assert torch.tensor(norms).isfinite().all()
        assert len(set(norms)) == 5
    metrics = records_of(tmp_path / "found")
    assert [entry["skipped"] for entry in metrics] == [i == BROKEN_STEP for i in range(1, 7)]
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]
    for one, other in zip(records[:2], records[2:], strict=True):  # of the two instances
        assert [weights for _, weights in one] == [weights for _, weights in other]
    # Training goes on as if the batch had not been.
    left_out = [*argv, "--run-dir", str(tmp_path / "left-out")]
    assert world(4).fork(train_with_fault, None, left_out) == records
    assert losses(tmp_path / "left-out") == losses(tmp_path / "found")
