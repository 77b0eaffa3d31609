"""Runs that are stopped: asked to by a signal or a clock, or killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dion.checkpointing.folders import complete_iterations
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses
from tests.project import ROOT
from tests.unit.test_command_line import exit_of_rank

RUN = [
    *MODEL, *TRAINING, *DION, "--num-layers", "2", "--seq-length", "16",
    "--max-position-embeddings", "16", "--train-iters", "8", "--save-interval", "100",
]  # fmt: skip
STOP_AFTER = 3


def stop_after(how: str, argv: list[str]) -> tuple[object, str]:
    """On a rank: in iteration `STOP_AFTER` the last rank hears a signal, or the time is over."""
    from megatron.training import training

    from megatron_dion.optimizer.chain import DionChainedOptimizer

    steps = 0
    step = DionChainedOptimizer.step

    def counted(self: DionChainedOptimizer) -> object:
        nonlocal steps
        steps += 1
        if steps == STOP_AFTER and how == "signal" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        if steps == STOP_AFTER and how == "duration":
            training._TRAIN_START_TIME -= 3600
        return step(self)

    DionChainedOptimizer.step = counted
    return exit_of_rank(argv)


@pytest.mark.parametrize("how", ["signal", pytest.param("duration", marks=pytest.mark.slow)])
def test_run_that_is_asked_to_stop_saves_and_goes_on(
    nursery: Nursery, tmp_path: Path, how: str
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    plain = nursery.run(2, exit_of_rank, [*RUN, "--run-dir", str(whole)])
    assert [code for code, _ in plain] == [0, 0]
    flag = ["--exit-signal-handler"] if how == "signal" else ["--exit-duration-in-mins", "30"]
    folder = str(tmp_path / "saved")
    argv = [*RUN, *flag, "--save", folder, "--load", folder, "--run-dir", str(stopped)]
    everything = nursery.run(2, stop_after, how, argv)
    assert [code for code, _ in everything] == [0, 0], everything[0][1][-2000:]
    assert complete_iterations(tmp_path / "saved") == [STOP_AFTER]
    assert losses(stopped) == losses(whole)[:STOP_AFTER]
    again = nursery.run(2, exit_of_rank, argv)
    assert [code for code, _ in again] == [0, 0]
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--seed 1", "--seed 2 -- --async-save"])
def test_killed_runs_end_as_undisturbed_ones(flags: str) -> None:
    """The commands of docs/checkpoints.md with fewer trials."""
    command = f"{sys.executable} -m tests.distributed.kills --trials 2 {flags}"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "2 runs killed" in done.stdout
