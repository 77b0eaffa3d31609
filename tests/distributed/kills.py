"""Runs that lose a rank to SIGKILL, over and over, and have to end as if nothing had happened.

    python -m tests.distributed.kills --trials 50

A run is started, a random rank of it is killed at a random moment, and it is started again on
another topology from whatever checkpoints it has left, until as many have been killed as asked for;
then it runs to its end. Its losses must be those of a run that nobody disturbed. Moments are drawn
over the whole life of a run: while it starts, loads, trains, saves and publishes.
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

import torch

from megatron_dion.checkpointing import folders
from megatron_dion.platforms.ports import free_port
from megatron_dion_tools.local.preload import start_queues_by
from megatron_dion_tools.local.world import end, environment_of
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses, train
from tests.distributed.recording import save_start
from tests.guardian import guard_this_process

_FORK = multiprocessing.get_context("fork")

ITERATIONS = 12
SIZE = [
    *MODEL, *TRAINING, *DION, *"--num-layers 2 --clip-grad 0 --seq-length 16".split(),
    "--max-position-embeddings", "16",
]  # fmt: skip
RUN = [*SIZE, "--train-iters", str(ITERATIONS), "--save-interval", "2"]
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
# When a rank is killed: by the clock, or as soon as such a file appears.
MOMENTS = {
    "by the clock": None,
    "while saving": "partial_*/*.distcp",
    "before publishing": "partial_*/.metadata",
    "at its end": "partial_*/metadata.json",
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
        slowest: seconds until the last survivor of a kill had ended by itself.
        problems: what should not have happened.
    """

    killed: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        moments = ", ".join(f"{count} {moment}" for moment, count in sorted(self.killed.items()))
        return (
            f"{self.killed.total()} runs killed ({moments}); survivors ended within"
            f" {self.slowest:.1f} s; problems: {self.problems or 'none'}"
        )


class Run:
    """A run of some topology, whose ranks have groups of processes of their own."""

    def __init__(self, folder: Path, start: Path, topology: str, flags: Sequence[str]) -> None:
        ranks, micro, grid = TOPOLOGIES[topology]
        self.saved, self.log = folder / "checkpoints", folder / "log"
        folder.mkdir(exist_ok=True)
        self._said_before = self.log.stat().st_size if self.log.exists() else 0
        argv = [*RUN, *grid.split(), "--micro-batch-size", str(micro), "--run-dir", str(folder)]
        argv += ["--load", str(self.saved), "--save", str(self.saved)]
        argv += ["--pretrained-checkpoint", str(start), *flags]
        port = str(free_port())
        self.ranks = [
            _FORK.Process(target=_run_rank, args=(rank, ranks, port, argv, self.log))
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

    def said(self) -> str:
        return self.log.read_bytes()[self._said_before :].decode()

    def stacks(self) -> str:
        """Where the ranks that still run are."""
        before = len(self.said())
        for process in self.ranks:
            if process.exitcode is None:
                os.kill(process.pid or 0, signal.SIGUSR1)
        deadline = time.monotonic() + 5.0
        while "most recent call first" not in self.said()[before:]:
            if time.monotonic() > deadline:
                return "unknown"
            time.sleep(_POLL_SECONDS)
        return self.said()[before:]


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
    chance, report, start = random.Random(seed), Report(), folder / "start"
    began = time.monotonic()
    whole = Run(folder / "undisturbed", start, "dp2", flags)
    try:
        assert whole.wait(SECONDS_TO_FINISH), "the undisturbed run hangs"
    finally:
        whole.clean()
    assert whole.codes() == [0, 0], whole.said()[-3000:]
    seconds, undisturbed = time.monotonic() - began, losses(folder / "undisturbed")
    number = 0
    while report.killed.total() < trials and not report.problems:
        number += 1
        run = folder / f"run{number}"
        kills = min(chance.randint(2, 6), trials - report.killed.total())
        _kill_until_done(run, start, chance, kills, seconds, flags, report)
        found = [] if report.problems else losses(run)
        if found and not _are_equal(found, undisturbed):
            report.problems.append(f"{run} is another run: {found}, not {undisturbed}")
    return report


def _are_equal(one: list[float], other: list[float]) -> bool:
    differences = [abs(a - b) for a, b in zip(one, other, strict=False)]
    return len(one) == len(other) and max(differences) < 2e-5


def _kill_until_done(
    folder: Path,
    start: Path,
    chance: random.Random,
    kills: int,
    seconds: float,
    flags: Sequence[str],
    report: Report,
) -> None:
    """Kills a run a few times and lets it finish."""
    while not report.problems:
        newest = _newest(folder / "checkpoints")
        run = Run(folder, start, chance.choice(sorted(TOPOLOGIES)), flags)
        try:
            if kills:
                kills -= _kill(run, chance, seconds, report)
            elif not run.wait(SECONDS_TO_FINISH):
                report.problems.append(f"{folder}: a run that nobody killed hangs")
        finally:
            run.clean()
        said = run.said()
        loaded = re.search(r"loaded checkpoint from \S+/checkpoints .* at iteration (\d+)", said)
        began = int(loaded[1]) if loaded else 0
        if "before the start of training step" in said and began != newest:
            report.problems.append(f"{folder}: began at {began}, with a checkpoint of {newest}")
        if set(run.codes()) == {0}:
            return
        if -signal.SIGKILL not in run.codes():
            report.problems.append(f"{folder}: ended by itself, {run.codes()}: {said[-2000:]}")


def _newest(saved: Path) -> int:
    """The iteration from which the next start has to go on, also if its name is still missing."""
    complete = [path for path in saved.glob("*iter_*") if folders.is_complete(path)]
    return max((folders.iteration_of(path) or 0 for path in complete), default=0)


def _kill(run: Run, chance: random.Random, seconds: float, report: Report) -> bool:
    """Kills a rank at a moment that is drawn; False where the run was done before."""
    victim = chance.choice(run.ranks)
    moment, sign = chance.choice(list(MOMENTS.items()))
    before = set(run.saved.glob(sign)) if sign else set()
    deadline = time.monotonic() + (60.0 if sign else chance.uniform(0, 1.2 * seconds))
    while run.is_running() and time.monotonic() < deadline:
        if sign and set(run.saved.glob(sign)) - before:
            time.sleep(chance.uniform(0, 0.02))
            break
        time.sleep(_POLL_SECONDS)
    if not run.is_running() or victim.exitcode is not None:
        return False
    os.kill(victim.pid or 0, signal.SIGKILL)
    report.killed[moment] += 1
    killed = time.monotonic()
    if run.wait(SECONDS_TO_NOTICE):
        report.slowest = max(report.slowest, time.monotonic() - killed)
    elif not any(call in (stacks := run.stacks()) for call in LOOKING_FOR_EACH_OTHER):
        report.problems.append(f"{run.saved}: ranks hang, a rank was killed {moment}: {stacks}")
    print(f"{report.killed.total()} killed", flush=True)
    return True


def main() -> None:
    """Run the trials and print what happened; end with status 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50, help="runs to be killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="more flags for the runs")
    args = parser.parse_args()
    guard_this_process()
    nursery = Nursery()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        save_start(nursery, SIZE, Path(folder) / "start")
        report = nursery.call(disturb, args.trials, args.seed, Path(folder), args.flags)
    print(report)
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    from tests.distributed import kills  # the process that forks the ranks cannot import __main__

    kills.main()
