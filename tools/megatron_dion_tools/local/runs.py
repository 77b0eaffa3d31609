"""Training runs on this machine: several at a time; a finished one is not trained again."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.world import RankError, end_with_parent, run_world, start

_FORK = multiprocessing.get_context("fork")
_LOG_LINES_SHOWN = 15


class RunFailed(ToolError):
    """A run ended before its last iteration; the message has the end of its log."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: Its name in messages.
        folder: Its run directory, which gets `train.log` too.
        flags: Flags of pretrain_gpt.py, without `--run-dir`.
        processes: Number of ranks.
        patch: `FILE:FUNCTION`, which every rank calls before training to break something on
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
        """Whether the run was trained to its end with exactly these settings."""
        mark = self.folder / "finished.json"
        return mark.exists() and mark.read_text() == self._settings()

    def mark_finished(self) -> None:
        """Record that the run was trained to its end."""
        (self.folder / "finished.json").write_text(self._settings())

    def remove(self) -> None:
        """Delete all that the run has written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _settings(self) -> str:
        settings = {k: v for k, v in asdict(self).items() if k not in ("name", "folder")}
        return json.dumps(settings, indent=2) + "\n"


def execute(runs: Sequence[Run], jobs: int, report: Callable[[str], None]) -> None:
    """Train all runs that are not finished, several at a time, in the given order.

    Args:
        runs: What to train. The process must have called `preload` of this package.
        jobs: How many ranks may run at a time; a run that has more runs alone.
        report: Takes a line of progress.

    Raises:
        RunFailed: A run failed. The runs beside it were ended.
    """
    waiting = [run for run in runs if not run.is_finished()]
    if runs:
        report(f"{len(waiting)} of {len(runs)} runs to train")
    busy: dict[BaseProcess, Run] = {}
    try:
        while waiting or busy:
            ranks = sum(run.processes for run in busy.values())
            if waiting and (not busy or ranks + waiting[0].processes <= jobs):
                run = waiting.pop(0)
                starting = _FORK.Process(target=_train_in_world, args=(run,))
                busy[starting] = run  # before it starts, lest a signal come between
                start(starting)
                continue
            ended = wait([process.sentinel for process in busy])
            for process in [each for each in busy if each.sentinel in ended]:
                run = busy.pop(process)
                process.join()
                if process.exitcode != 0:
                    raise RunFailed(_failure(run))
                run.mark_finished()
                report(f"trained {run.name}; {len(waiting) + len(busy)} runs left")
    finally:
        for process in (each for each in busy if each.pid is not None):
            process.terminate()
            process.join()


def _train_in_world(run: Run) -> None:
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `run_world` then ends its ranks.
    run.remove()
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


def train(flags: Sequence[str], patch: str | None = None) -> None:
    """Train on this rank as pretrain_gpt.py would, after the patch of a `Run`."""
    from megatron_dion.megatron.launch import train as launch

    if patch is not None:
        file, _, function = patch.rpartition(":")
        runpy.run_path(file)[function]()
    launch(flags)


def _failure(run: Run) -> str:
    log = run.folder / "train.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([*lines[-_LOG_LINES_SHOWN:], f"{run.name} failed; its log is {log}"])
