"""Studies: methods compared in settings, each at its own best learning rate, over seeds."""

import hashlib
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion_tools.convergence.training_file import Flags, TrainingFile, read_training_file
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.flags import effective
from megatron_dion_tools.local.runs import Run, execute

_MOST_RATES = 8
"""A loss that still falls after so many doublings is not a matter of the learning rate."""

Losses = dict[float, dict[int, float]]
"""Final validation loss (nats per token) by learning rate, ascending, and by seed."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        lr: The learning rate with which its sweep begins.
        flags: Flags of pretrain_gpt.py.
    """

    lr: float
    flags: Flags = ()


@dataclass(frozen=True, kw_only=True)
class Study(TrainingFile):
    """A question, and the runs that answer it.

    Attributes:
        question: What is asked.
        methods: The methods, by name.
        axis: What the settings vary.
        settings: Flags, by name of setting.
        rates: Learning rates as multiples of each method's first one, at which all seeds train.
            Without them, the first seed trains at the first rate, its double, its half, and so on
            until the best rate lies between two others; then the other seeds train at the best.
        baseline: The method with which all others are compared.
    """

    question: str
    methods: Mapping[str, Method]
    axis: str = ""
    settings: Mapping[str, Flags] = field(default_factory=lambda: {"": ()})
    rates: tuple[float, ...] = ()
    baseline: str | None = None


def read_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ToolError: The file is not a study; the message names the file, the key and the value.
    """
    study = read_training_file(path, Study)
    if study.baseline not in (None, *study.methods):
        names = ", ".join(study.methods)
        raise ToolError(f"{path}: baseline {study.baseline!r} is not a method (there are {names})")
    return study


class StudyRuns:
    """The runs of a study on this machine.

    The folder of a run is the hash of its flags: studies share runs, and an interrupted study goes
    on where it stopped.

    Args:
        study: The study.
        pool: The folder of the runs of all studies.
    """

    def __init__(self, study: Study, pool: Path) -> None:
        self.study = study
        self.data = study.prepare_data()
        self._pool = pool

    def train(self, jobs: int, report: Callable[[str], None]) -> None:
        """Train all runs that the study needs and that are not finished.

        Args:
            jobs: How many runs train at a time.
            report: Takes a line of progress.

        Raises:
            RunFailed: A run failed.
        """
        cells = [(setting, name) for setting in self.study.settings for name in self.study.methods]
        # By folder: two methods may need the same run.
        while missing := {run.folder: run for cell in cells for run in self.missing(*cell)}:
            report(f"{self.study.name}:")
            execute(list(missing.values()), jobs, report)

    def run(self, setting: str, method: str, lr: float, seed: int) -> Run:
        """Return a run of the study."""
        flags = (*self.study.common_flags, *self.study.settings[setting])
        flags = (*flags, *self.study.methods[method].flags, "--lr", f"{lr:g}")
        flags = effective((*flags, "--min-lr", f"{lr / 10:g}", "--seed", str(seed), *self.data))
        digest = hashlib.sha256(shlex.join(flags).encode()).hexdigest()
        name = f"{setting}, {method}, lr {lr:g}, seed {seed}".removeprefix(", ")
        return Run(name, self._pool / digest[:16], flags)

    def losses(self, setting: str, method: str) -> Losses:
        """Return the losses of finished runs, infinite where training diverged.

        Only learning rates with which the first seed has trained count.
        """
        first = self.study.methods[method].lr
        multiples = {2.0**power for power in range(-_MOST_RATES, _MOST_RATES + 1)}
        losses: Losses = {}
        for lr in sorted(first * multiple for multiple in multiples | set(self.study.rates)):
            runs = {seed: self.run(setting, method, lr, seed) for seed in self.study.seeds}
            if runs[self.study.seeds[0]].is_finished():
                losses[lr] = {s: _loss(run) for s, run in runs.items() if run.is_finished()}
        return losses

    def missing(self, setting: str, method: str) -> list[Run]:
        """Return the runs that a method needs next in a setting; none when it is finished."""
        study, first = self.study, self.study.methods[method].lr
        rates = [first * m for m in study.rates] or [first / 2, first, first * 2]
        seeds = study.seeds if study.rates else study.seeds[:1]
        losses = self.losses(setting, method)
        if not study.rates and set(rates) <= set(losses):
            best = best_rate(losses)
            next_rate = {min(losses): best / 2, max(losses): best * 2}.get(best)
            if next_rate is None or len(losses) >= _MOST_RATES:
                rates, seeds = [best], study.seeds
            else:
                rates = [next_rate]
        runs = [self.run(setting, method, lr, seed) for lr in rates for seed in seeds]
        return [run for run in runs if not run.is_finished()]


def best_rate(losses: Losses) -> float:
    """Return the learning rate with the lowest loss of the first seed."""
    return min(losses, key=lambda lr: next(iter(losses[lr].values())))


def _loss(run: Run) -> float:
    losses = [r["lm_loss"] for r in read_metrics(run.metrics) if r["kind"] == "validation"]
    return losses[-1] if losses and math.isfinite(losses[-1] or math.nan) else math.inf
