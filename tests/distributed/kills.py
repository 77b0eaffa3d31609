"""Runs that lose a rank to SIGKILL, over and over, and have to end as if nothing had happened.

    python -m tests.distributed.kills --trials 50

A run is started, a random rank of it is killed at a random moment, and it is started again on
another topology from whatever checkpoints it has left, until as many have been killed as asked for;
then it runs to its end. Its final loss must be that of a run that nobody disturbed. Moments are
drawn over the whole life of a run: while it starts, loads, trains, saves and publishes.
"""

import argparse
import faulthandler
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_dion.checkpointing import folders
from megatron_dion.platforms.ports import free_port
from megatron_dion_tools.local.preload import start_queues_by
from megatron_dion_tools.local.world import end, environment_of
from tests.distributed.nursery import (
    DION,
    MODEL,
    TRAINING,
    Nursery,
    losses,
    train,
)
from tests.distributed.recording import save_start

_FORK = multiprocessing.get_context("fork")

ITERATIONS = 12
RUN = [
    *MODEL, *TRAINING, *DION, "--num-layers", "2", "--clip-grad", "0",
    *"--seq-length 16 --max-position-embeddings 16".split(),
    "--train-iters", str(ITERATIONS), "--save-interval", "2",
]  # fmt: skip
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000"
INSTANCES = "--num-distributed-optimizer-instances 2"
# Ranks, samples of a rank at a time, flags.
TOPOLOGIES: dict[str, tuple[int, int, str]] = {
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
# A rank whose peer is gone must end by itself within this time. But while processes look for each
# other they wait for minutes; there it is the launcher (torchrun, srun) that ends them.
SECONDS_TO_NOTICE = 20.0
LOOKING_FOR_EACH_OTHER = ("init_process_group", "new_group", "new_subgroups_by_enumeration")
# Longer than any of these runs takes, also on a busy machine.
SECONDS_TO_FINISH = 300.0
_POLL_SECONDS = 0.002


@dataclass
class Report:
    """What happened.

    Attributes:
        killed: runs that lost a rank, by what they were doing.
        passed_over: starts that found a checkpoint that was never finished.
        from_nothing: starts that found no complete checkpoint.
        slowest: seconds until the last survivor of a kill had ended by itself.
        ended_by_launcher: runs whose survivors were still looking for the killed rank.
        problems: what should not have happened.
    """

    killed: Counter[str] = field(default_factory=Counter)
    passed_over: int = 0
    from_nothing: int = 0
    slowest: float = 0.0
    ended_by_launcher: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        moments = ", ".join(f"{count} {what}" for what, count in sorted(self.killed.items()))
        return (
            f"{sum(self.killed.values())} runs killed ({moments}); unfinished checkpoints passed"
            f" over {self.passed_over} times; {self.from_nothing} starts without any checkpoint;"
            f" survivors ended within {self.slowest:.1f} s, but for {self.ended_by_launcher} times"
            f" when they had not found each other yet; problems: {self.problems or 'none'}"
        )


class World:
    """Ranks that train, in a group of processes of their own.

    Args:
        ranks: how many.
        argv: the command line.
        log: where they print.
    """

    def __init__(self, ranks: int, argv: Sequence[str], log: Path) -> None:
        port = str(free_port())
        self.ranks = [
            _FORK.Process(target=_run_rank, args=(rank, ranks, port, list(argv), log))
            for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    def is_running(self) -> bool:
        return any(process.exitcode is None for process in self.ranks)

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.ranks]

    def wait(self, seconds: float) -> bool:
        """Waits for all ranks to end; False if some have not."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return not self.is_running()

    def clean(self) -> None:
        """Ends what is left: ranks, and helpers that they have started."""
        for process in self.ranks:
            end(process)

    def stacks(self, log: Path) -> str:
        """Where the ranks that still run are."""
        before = log.stat().st_size
        for process in self.ranks:
            if process.exitcode is None:
                os.kill(process.pid or 0, signal.SIGUSR1)
        deadline = time.monotonic() + 5.0
        while "most recent call first" not in log.read_text()[before:]:
            if time.monotonic() > deadline:
                return "unknown"
            time.sleep(_POLL_SECONDS)
        return log.read_text()[before:]


def _run_rank(rank: int, size: int, port: str, argv: list[str], log: Path) -> None:
    os.setpgrp()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2)
    os.environ |= environment_of(rank, size, port)
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    start_queues_by("spawn")  # forked ones would hold what tells that this process has ended
    code = 1
    try:
        train(argv)
        code = 0
    except BaseException as error:  # a lost peer, in whatever call this rank was
        print(f"rank {rank} ends: {type(error).__name__}: {error}", flush=True)
    os._exit(code)


def disturb(trials: int, seed: int, folder: Path, flags: Sequence[str] = ()) -> Report:
    """In the nursery: kills runs, restarts them, and compares the end with an undisturbed run."""
    chance = random.Random(seed)
    report = Report()
    start = folder / "start"
    undisturbed, seconds = _undisturbed(folder, start, flags)
    number = 0
    while sum(report.killed.values()) < trials and not report.problems:
        number += 1
        run = folder / f"run{number}"
        _one_run(run, start, chance, trials, seconds, flags, report)
        if not report.problems:
            _compare(run, undisturbed, report)
    return report


def _undisturbed(folder: Path, start: Path, flags: Sequence[str]) -> tuple[list[float], float]:
    run = folder / "undisturbed"
    began = time.monotonic()
    world = _start(run, start, "dp2", flags)
    finished = world.wait(SECONDS_TO_FINISH)
    world.clean()
    assert finished
    assert world.codes() == [0, 0], (run / "log").read_text()[-3000:]
    return losses(run), time.monotonic() - began


def _start(run: Path, start: Path, topology: str, flags: Sequence[str]) -> World:
    ranks, micro, grid = TOPOLOGIES[topology]
    saved = run / "checkpoints"
    run.mkdir(exist_ok=True)
    argv = [*RUN, *grid.split(), "--micro-batch-size", str(micro), "--run-dir", str(run), *flags]
    argv += ["--load", str(saved), "--save", str(saved), "--pretrained-checkpoint", str(start)]
    return World(ranks, argv, run / "log")


def _one_run(
    run: Path,
    start: Path,
    chance: random.Random,
    trials: int,
    seconds: float,
    flags: Sequence[str],
    report: Report,
) -> None:
    """Kills a run a few times and lets it finish."""
    kills = chance.randint(2, 6)
    while True:
        expected = _newest(run / "checkpoints")
        said = (run / "log").stat().st_size if (run / "log").exists() else 0
        world = _start(run, start, chance.choice(sorted(TOPOLOGIES)), flags)
        try:
            if kills and sum(report.killed.values()) < trials:
                _kill(world, run, chance, seconds, report)
                kills -= 1
            elif not world.wait(SECONDS_TO_FINISH):
                report.problems.append(f"{run}: a run that nobody killed hangs")
        finally:
            world.clean()
        _check_start((run / "log").read_bytes()[said:].decode(), expected, run, report)
        if report.problems or world.codes() == [0] * len(world.ranks):
            return
        if -signal.SIGKILL not in world.codes():
            tail = (run / "log").read_text()[-2000:]
            report.problems.append(f"{run}: ended by itself with {world.codes()}: {tail}")
            return


def _kill(world: World, run: Path, chance: random.Random, seconds: float, report: Report) -> None:
    """Kills a rank at a moment that is drawn: by the clock, or as soon as a file appears."""
    victim = chance.choice(world.ranks)
    what, sign = chance.choice(
        [
            ("by the clock", None),
            ("while saving", "partial_*/*.distcp"),
            ("before publishing", "partial_*/.metadata"),
            ("at its end", "partial_*/metadata.json"),
        ]
    )
    before = set((run / "checkpoints").glob(sign)) if sign else set()
    deadline = time.monotonic() + (chance.uniform(0, 1.2 * seconds) if not sign else 60.0)
    while world.is_running() and time.monotonic() < deadline:
        if sign and set((run / "checkpoints").glob(sign)) - before:
            time.sleep(chance.uniform(0, 0.02))
            break
        time.sleep(_POLL_SECONDS)
    if not world.is_running() or victim.exitcode is not None:
        return  # it was done before
    os.kill(victim.pid or 0, signal.SIGKILL)
    report.killed[what] += 1
    killed = time.monotonic()
    if world.wait(SECONDS_TO_NOTICE):
        report.slowest = max(report.slowest, time.monotonic() - killed)
    else:
        stacks = world.stacks(run / "log")
        if any(call in stacks for call in LOOKING_FOR_EACH_OTHER):
            report.ended_by_launcher += 1
        else:
            report.problems.append(f"{run}: ranks hang, a rank was killed {what}: {stacks}")
        world.clean()
    print(f"{sum(report.killed.values())} killed", flush=True)
    _look_at(run / "checkpoints", report)


def _newest(saved: Path) -> int:
    """The iteration from which the next start has to go on, also if its name is still missing."""
    done = [path.name for path in saved.glob("*iter_*") if folders.is_complete(path)]
    return max((int(name.split("iter_")[1].split(".")[0]) for name in done), default=0)


def _check_start(said: str, expected: int, run: Path, report: Report) -> None:
    """Nothing that was complete may be lost, in silence or not."""
    found = re.search(
        r"successfully loaded checkpoint from \S+/checkpoints .* at iteration (\d+)", said
    )
    began = int(found[1]) if found else 0
    if "before the start of training step" in said and began != expected:
        report.problems.append(
            f"{run}: began at iteration {began}, with a checkpoint of {expected}"
        )


def _look_at(saved: Path, report: Report) -> None:
    """What the next start will find."""
    if not saved.exists() or not folders.complete_iterations(saved):
        report.from_nothing += 1
    elif folders.unfinished(saved):
        report.passed_over += 1


def _compare(run: Path, undisturbed: list[float], report: Report) -> None:
    found = losses(run)
    if len(found) != ITERATIONS:
        report.problems.append(f"{run} has {len(found)} iterations of {ITERATIONS}")
        return
    difference = max(abs(a - b) for a, b in zip(found, undisturbed, strict=True))
    if difference > 2e-5:
        report.problems.append(f"{run}: losses differ by {difference}: another run")


def main() -> None:
    """Run the trials and print what happened; end with status 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50, help="runs to be killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="more flags for the runs")
    args = parser.parse_args()
    nursery = Nursery()
    try:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            report = run_trials(nursery, args.trials, args.seed, Path(folder), args.flags)
    finally:
        nursery.close()
    print(report)
    sys.exit(1 if report.problems else 0)


def run_trials(
    nursery: Nursery, trials: int, seed: int, folder: Path, flags: Sequence[str] = ()
) -> Report:
    """Kills as many runs as asked for; each of the runs that go on has to end undisturbed."""
    save_start(nursery, RUN[: RUN.index("--train-iters")], folder / "start")
    report: Any = nursery.call(disturb, trials, seed, folder, list(flags))
    assert isinstance(report, Report)
    return report


if __name__ == "__main__":
    main()
