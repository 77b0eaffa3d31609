"""Averaging factors in place of gradients over optimizer instances is the same run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dion import Dion
from tests.distributed.tiny_gpt import (
    DION,
    INSTANCES,
    MODEL,
    OVERLAP,
    TP2,
    TRAINING,
    losses,
    records_of,
)
from tests.worlds import train, world

# Weights whose gradients are compressed do not move along the residual.
RUN = f"{INSTANCES} --num-layers 2 --train-iters 10 --dion-residual none".split()
COMPRESSED = "--dion-compressed-sync"
EXPERTS = (
    "--num-experts 4 --moe-router-topk 4 --moe-ffn-hidden-size 40"
    " --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall"
    " --expert-model-parallel-size 2"
).split()
# Compression pays for some weights only at the second's rank fraction.
CASES = {
    "tp2-dp2": (4, TP2.split()),
    "half-rank": (4, f"{OVERLAP} --dion-rank-fraction 0.6".split()),
}
SLOW_CASES = {
    "dp2": (2, []),
    "dp4": (4, []),
    "mean-in-collective": (4, f"{OVERLAP} --ddp-average-in-collective".split()),
    "experts": (4, EXPERTS),
    "recentered": (4, []),
}


def train_watched(argv: Sequence[str]) -> list[list[torch.Tensor]]:
    """On a rank: trains; its weights after every step, and its momenta after the last."""
    weights: list[list[torch.Tensor]] = []
    momenta: list[torch.Tensor] = []
    step = Dion.step

    def watched(self: Dion, closure: None = None) -> None:
        step(self, closure)
        weights.append([piece.detach().clone() for piece in self.state])
        momenta[:] = [state["momentum"].clone() for state in self.state.values()]

    Dion.step = watched
    train([*MODEL, *TRAINING, *DION, *RUN, *argv])
    return [*weights, momenta]


def run(size: int, folder: Path, argv: Sequence[str]) -> Any:
    records = world(size).fork(train_watched, [*argv, "--run-dir", str(folder)])
    return losses(folder), records


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_same_losses_as_dense_sync_and_equal_replicas(tmp_path: Path, case: str) -> None:
    size, flags = (CASES | SLOW_CASES)[case]
    unclipped = [*flags, "--clip-grad", "0"]
    dense, _ = run(size, tmp_path / "dense", unclipped)
    recenter = ["--dion-recenter-interval", "3"] if case == "recentered" else []
    unclipped += [COMPRESSED, *recenter]
    compressed, records = run(size, tmp_path / "compressed", unclipped)
    assert max(abs(a - b) for a, b in zip(dense, compressed, strict=True)) < 1e-5
    replica = size // 2  # instances consist of consecutive ranks
    for one, other in zip(records[:replica], records[replica:], strict=True):
        *weights, momenta = one
        *others, drifted = other
        for here, there in zip(weights, others, strict=True):
            assert all(map(torch.equal, here, there))
        assert not all(map(torch.equal, momenta, drifted))


def test_clipping_by_the_estimated_norm(tmp_path: Path) -> None:
    """The norm is within 3 % of the true one, and the run follows the dense one to that."""
    clip = ["--clip-grad", "0.3"]
    dense, _ = run(4, tmp_path / "dense", clip)
    compressed, _ = run(4, tmp_path / "compressed", [*clip, COMPRESSED])
    norms = [
        [entry["grad_norm"] for entry in records_of(tmp_path / kind)]
        for kind in ("dense", "compressed")
    ]
    assert min(norms[0]) > 0.3  # every step is clipped
    assert all(abs(a - b) < 0.03 * a for a, b in zip(*norms, strict=True))
    assert norms[0] != norms[1]
    assert max(abs(a - b) for a, b in zip(dense, compressed, strict=True)) < 3e-3
