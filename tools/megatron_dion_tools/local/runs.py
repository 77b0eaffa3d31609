"""Training runs on this machine: several at a time, reused where they are finished."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_dion_tools.local.world import RankError, run_world

_FORK = multiprocessing.get_context("fork")
_LOG_LINES_SHOWN = 15


class RunFailed(Exception):
    """A run ended before its last iteration; says which, why, and where its log is."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: for people.
        folder: its run directory; the log is in it, too.
        flags: of pretrain_gpt.py, without `--run-dir`.
        processes: number of ranks.
        patch: `file:function` to call on every rank before training, to break something on
            purpose.
    """

    name: str
    folder: Path
    flags: tuple[str, ...]
    processes: int = 1
    patch: str | None = None

    @property
    def metrics(self) -> Path:
        """The file of its curves."""
        return self.folder / "metrics.jsonl"

    def is_finished(self) -> bool:
        """Whether it has been run to its end with these very flags."""
        done = self.folder / "finished.json"
        return done.exists() and done.read_text() == self._identity()

    def mark_finished(self) -> None:
        """Let later calls reuse it."""
        (self.folder / "finished.json").write_text(self._identity())

    def forget(self) -> None:
        """Remove all that it has written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _identity(self) -> str:
        kept = {key: value for key, value in asdict(self).items() if key not in ("name", "folder")}
        return json.dumps(kept, indent=2) + "\n"


def execute(runs: Sequence[Run], jobs: int, report: Callable[[str], None]) -> None:
    """Train all runs that are not finished, several at a time, in the order given.

    The process must have called `megatron_dion_tools.local.preload.preload`.

    Args:
        runs: what to train.
        jobs: how many processes share the machine; a run that has more runs alone.
        report: takes a line of progress.

    Raises:
        RunFailed: a run failed. Those beside it are ended.
    """
    missing = [run for run in runs if not run.is_finished()]
    if len(missing) < len(runs):
        report(f"{len(runs) - len(missing)} of {len(runs)} runs were finished before")
    started = time.monotonic()
    for number, (run, seconds) in enumerate(_in_parallel(missing, jobs), start=1):
        per_run = (time.monotonic() - started) / number
        report(
            f"run {number}/{len(missing)}: {run.name}: {seconds:.0f} s, "
            f"about {per_run * (len(missing) - number) / 60:.0f} min left"
        )


def _in_parallel(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, float]]:
    """Yields runs as they finish, with their seconds."""
    waiting = list(runs)
    busy: dict[Any, tuple[BaseProcess, Run, float]] = {}
    try:
        while waiting or busy:
            while waiting and (not busy or _processes(busy) + waiting[0].processes <= jobs):
                run = waiting.pop(0)
                starting = _FORK.Process(target=_train_in_world, args=(run,))
                starting.start()
                busy[starting.sentinel] = (starting, run, time.monotonic())
            for sentinel in wait(list(busy)):
                process, run, start = busy.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    raise RunFailed(_explain(run))
                run.mark_finished()
                yield run, time.monotonic() - start
    finally:
        for process, _, _ in busy.values():
            process.terminate()
        for process, _, _ in busy.values():
            process.join()


def _processes(busy: Mapping[Any, tuple[BaseProcess, Run, float]]) -> int:
    return sum(run.processes for _, run, _ in busy.values())


def _train_in_world(run: Run) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `run_world` ends its ranks
    run.forget()
    run.folder.mkdir(parents=True)
    log = os.open(run.folder / "train.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    flags = [*run.flags, "--run-dir", str(run.folder)]
    try:
        run_world(run.processes, train, flags, run.patch)
    except RankError as error:
        print(error, flush=True)
        os._exit(1)


def train(flags: Sequence[str], patch: str | None) -> None:
    """On a rank: train as pretrain_gpt.py would, with something broken if `patch` says so."""
    from megatron_dion.megatron.launch import train as launch

    if patch is not None:
        file, _, function = patch.rpartition(":")
        runpy.run_path(file)[function]()
    launch(flags)


def _explain(run: Run) -> str:
    log = run.folder / "train.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([*lines[-_LOG_LINES_SHOWN:], f"{run.name} failed; its log is {log}"])
