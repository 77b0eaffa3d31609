"""Runs that are stopped: asked to by a signal or a clock, or killed."""

import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_dion.checkpointing import folders
from tests.distributed.recording import save_start
from tests.distributed.tiny_gpt import (
    DION,
    INSTANCES,
    MODEL,
    OVERLAP,
    PP2,
    TP2,
    TRAINING,
    losses,
    save_in_background,
)
from tests.unit.test_command_line import exit_of_rank
from tests.worlds import RankError, train, world

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
def test_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path: Path, how: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    plain = world(2).fork(exit_of_rank, [*RUN, "--run-dir", str(whole)])
    assert [code for code, _ in plain] == [0, 0]
    flag = ["--exit-signal-handler"] if how == "signal" else ["--exit-duration-in-mins", "30"]
    folder = str(tmp_path / "saved")
    argv = [*RUN, *flag, "--save", folder, "--load", folder, "--run-dir", str(stopped)]
    everything = world(2).fork(stop_after, how, argv)
    assert [code for code, _ in everything] == [0, 0], everything[0][1][-2000:]
    assert folders.complete_iterations(tmp_path / "saved") == [STOP_AFTER]
    assert losses(stopped) == losses(whole)[:STOP_AFTER]
    again = world(2).fork(exit_of_rank, argv)
    assert [code for code, _ in again] == [0, 0]
    assert losses(stopped) == losses(whole)


# Ranks, samples of a rank at a time, flags.
TOPOLOGIES = {
    "dp2": (2, 6, OVERLAP),
    "dp3": (3, 4, ""),
    "tp2": (2, 12, TP2),
    "pp2": (2, 6, PP2),
    "cp2": (2, 12, "--context-parallel-size 2"),
    "tp2-dp2": (4, 6, f"{TP2} {OVERLAP}"),
    "tp2-pp2": (4, 6, f"{TP2} {PP2}"),
    "instances": (4, 3, INSTANCES),
    "compressed": (4, 3, f"{INSTANCES} --dion-compressed-sync"),
}
KILLS = int(os.environ.get("KILLS", "3"))


def train_until_killed(
    victim: int, moment: tuple[str, int], folder: Path, argv: Sequence[str]
) -> Counter[str]:
    """On a rank: trains; returns how often it did something of a kind to files in a folder.

    The victim is killed, with its writers, before it does something of one kind the n-th time.
    """
    kinds: Counter[str] = Counter()

    def count(event: str, args: tuple[object, ...]) -> None:
        path = Path(str(args[0])) if args and event.startswith(("open", "os.")) else Path()
        if path.is_relative_to(folder):
            name = path.name.partition(".")[0] if path.parent == folder else path.name
            kind = f"{event} {re.sub('[0-9]', '', name)}"
            kinds[kind] += 1
            if (kind, kinds[kind]) == moment and int(os.environ["RANK"]) == victim:
                os.killpg(0, signal.SIGKILL)

    save_in_background()
    sys.addaudithook(count)
    train(argv)
    return kinds


def start_run(
    topology: str, folder: Path, flags: str, victim: int = -1, moment: tuple[str, int] = ("", 0)
) -> list[Counter[str]]:
    ranks, micro, grid = TOPOLOGIES[topology]
    saved = folder / "checkpoints"
    # Compressed instances take the paper's update: all topologies do.
    argv = [*RUN, *f"--clip-grad 0 --dion-residual none --save-interval 2 {grid} {flags}".split()]
    argv += ["--micro-batch-size", str(micro), "--run-dir", str(folder)]
    argv += ["--load", str(saved), "--save", str(saved)]
    argv += ["--pretrained-checkpoint", str(folder.parent / "start")]
    return world(ranks).fork(train_until_killed, victim, moment, saved, argv)


def iterations_of_starts(folder: Path) -> list[int]:
    starts = folder / "starts.jsonl"
    lines = starts.read_text().splitlines() if starts.exists() else []
    return [json.loads(line)["iteration"] for line in lines]


def newest_complete(saved: Path) -> int:
    """The iteration from which the next start has to go on, also if its name is still missing."""
    complete = [path for path in saved.glob("*iter_*") if folders.is_complete(path)]
    return max((folders.iteration_of(path) or 0 for path in complete), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "flags"), [(1, ""), (2, "--async-save")])
def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path, seed: int, flags: str) -> None:
    """A rank dies at any moment of loading, saving or publishing; others go on, elsewhere."""
    save_start([*RUN, "--clip-grad", "0"], tmp_path / "start")
    kinds = start_run("dp2", tmp_path / "undisturbed", flags)
    chance, run = random.Random(seed), tmp_path / "run"
    killed = 0
    while killed < KILLS:
        newest, before = newest_complete(run / "checkpoints"), iterations_of_starts(run)
        topology, victim = chance.choice(list(TOPOLOGIES)), chance.randrange(2)
        kind, count = chance.choice(sorted(kinds[victim].items()))
        try:
            start_run(topology, run, flags, victim, (kind, chance.randint(1, count)))
        except RankError as error:
            if "died" not in str(error):
                raise
            killed += 1
            assert iterations_of_starts(run) in (before, [*before, newest])
        else:  # it did not come to that
            compare(run, tmp_path / "undisturbed")
            shutil.rmtree(run)
    start_run("tp2", run, flags)
    compare(run, tmp_path / "undisturbed")


def compare(run: Path, undisturbed: Path) -> None:
    assert losses(run) == pytest.approx(losses(undisturbed), rel=0, abs=2e-5)
