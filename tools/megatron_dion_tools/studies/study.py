"""Studies: methods compared in settings, each at its own best learning rate, over seeds."""

import hashlib
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion_tools.local.flags import effective, read_flags, split_flags
from megatron_dion_tools.local.runs import Run, execute

_FACTOR = 2.0
"""Between two learning rates of a sweep."""
_MOST_RATES = 8
"""A loss that still falls after so many doublings is not a matter of the learning rate."""


class FileError(Exception):
    """A study's file is not what it has to be; names the file and the key."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        flags: of pretrain_gpt.py.
        lr: where its sweep begins.
    """

    name: str
    flags: tuple[str, ...]
    lr: float


@dataclass(frozen=True)
class Study:
    """A question and the runs that answer it.

    Attributes:
        name: of its file.
        question: what it asks.
        common: flags of all runs.
        vocab_size: of the tokenizer of the corpus they train on.
        axis: what the settings vary.
        settings: flags by name of setting.
        methods: flags and first learning rate by name of method.
        seeds: all are run at the best learning rate, the first at all of them.
        rates: learning rates as multiples of each method's first; empty to double and halve until
            the best lies between two others. With them, every seed is run at every rate.
        baseline: the method that all others are compared with, if there is one.
        panels: the methods that share a panel of a picture, by its title.
    """

    name: str
    question: str
    common: tuple[str, ...]
    vocab_size: int
    axis: str
    settings: Mapping[str, tuple[str, ...]]
    methods: Mapping[str, Method]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    baseline: str | None
    panels: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Cell:
    """A method in a setting."""

    setting: str
    method: str


@dataclass(frozen=True)
class Trial:
    """A run of a study."""

    cell: Cell
    lr: float
    seed: int


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        FileError: it is not what a study's file has to be; names the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: not yaml: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: {content!r} is not a mapping")
    known = {"question", "arguments", "vocab_size", "axis", "settings", "methods", "seeds", "rates"}
    known |= {"baseline", "panels"}
    if unknown := set(content) - known:
        raise FileError(f"{path}: unknown keys {sorted(unknown)} (there are {sorted(known)})")
    try:
        study = Study(
            name=path.stem,
            question=content["question"],
            common=read_flags(path.parent / content["arguments"]),
            vocab_size=int(content["vocab_size"]),
            axis=content.get("axis", ""),
            settings={
                str(name): split_flags(flags)
                for name, flags in content.get("settings", {"": ""}).items()
            },
            methods={
                name: Method(name, split_flags(method["flags"]), float(method["lr"]))
                for name, method in content["methods"].items()
            },
            seeds=tuple(content["seeds"]),
            rates=tuple(map(float, content.get("rates", ()))),
            baseline=content.get("baseline"),
            panels={
                title: tuple(names)
                for title, names in content.get("panels", {"": content["methods"]}).items()
            },
        )
    except KeyError as error:
        raise FileError(f"{path}: no key {error}") from error
    if len(study.settings) > 1 and (wrong := [s for s in study.settings if not _is_number(s)]):
        raise FileError(f"{path}: settings {wrong} are no numbers, and pictures need an axis")
    named = {name for names in study.panels.values() for name in names} | {study.baseline}
    if unknown := named - {None, *study.methods}:
        raise FileError(f"{path}: no methods {sorted(map(str, unknown))} for baseline and panels")
    return study


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


class Trials:
    """Where a study's runs are, and what they ended with.

    Args:
        study: the study.
        pool: folder of all studies' runs; studies that need the same run share it.
        data: flags that name the data.
    """

    def __init__(self, study: Study, pool: Path, data: Sequence[str]) -> None:
        self.study = study
        self._pool = pool
        self.data = tuple(data)

    def run(self, trial: Trial) -> Run:
        """The training run of a trial."""
        study, cell = self.study, trial.cell
        method = study.methods[cell.method]
        rates = ("--lr", f"{trial.lr:g}", "--min-lr", f"{trial.lr / 10:g}")
        names = [cell.setting, cell.method, f"lr {trial.lr:g}", f"seed {trial.seed}"]
        flags = (*study.common, *study.settings[cell.setting], *method.flags, *rates)
        flags = effective((*flags, "--seed", str(trial.seed), *self.data))
        digest = hashlib.sha256(shlex.join(flags).encode()).hexdigest()
        return Run(", ".join(filter(None, names)), self._pool / digest[:16], flags)

    def loss(self, trial: Trial) -> float:
        """Validation loss after the last iteration; infinite where training diverged."""
        losses = [r["lm_loss"] for r in read_metrics(self.run(trial).metrics) if is_validation(r)]
        if not losses or losses[-1] is None or not math.isfinite(losses[-1]):
            return math.inf
        return float(losses[-1])

    def done(self, cell: Cell) -> list[Trial]:
        """All finished trials of a cell, by learning rate and seed."""
        method = self.study.methods[cell.method]
        powers = range(-_MOST_RATES, _MOST_RATES + 1)
        rates = {method.lr * _FACTOR**power for power in powers}
        rates |= {method.lr * rate for rate in self.study.rates}
        trials = [Trial(cell, lr, seed) for lr in sorted(rates) for seed in self.study.seeds]
        return [trial for trial in trials if self.run(trial).is_finished()]

    def best_rate(self, cell: Cell) -> float:
        """The learning rate with the lowest loss of the first seed."""
        first = [trial for trial in self.done(cell) if trial.seed == self.study.seeds[0]]
        return min(first, key=self.loss).lr


def conduct(trials: Trials, jobs: int, report: Callable[[str], None]) -> None:
    """Run all that a study needs; finished runs are reused.

    Args:
        trials: the study's runs.
        jobs: how many runs share the machine.
        report: takes a line of progress.

    Raises:
        RunFailed: a run failed.
    """
    study = trials.study
    cells = [Cell(setting, method) for setting in study.settings for method in study.methods]
    while wanted := [t for cell in cells for t in missing(trials, cell)]:
        report(f"{study.name}: {len(wanted)} runs")
        execute([trials.run(trial) for trial in wanted], jobs, report)


def missing(trials: Trials, cell: Cell) -> list[Trial]:
    """The runs that a cell needs next; none when it is finished."""
    study = trials.study
    if study.rates:
        lr = study.methods[cell.method].lr
        wanted = [Trial(cell, lr * rate, seed) for rate in study.rates for seed in study.seeds]
    else:
        wanted = [Trial(cell, lr, study.seeds[0]) for lr in _bracket(trials, cell)]
        if all(trials.run(trial).is_finished() for trial in wanted):
            wanted = [Trial(cell, trials.best_rate(cell), seed) for seed in study.seeds]
    return [trial for trial in wanted if not trials.run(trial).is_finished()]


def _bracket(trials: Trials, cell: Cell) -> list[float]:
    """The learning rates to try next: the first one, its neighbours, and then downhill."""
    lr = trials.study.methods[cell.method].lr
    tried = [trial.lr for trial in trials.done(cell) if trial.seed == trials.study.seeds[0]]
    first = [lr / _FACTOR, lr, lr * _FACTOR]
    if len(tried) < len(first) or len(tried) >= _MOST_RATES:
        return first
    best = trials.best_rate(cell)
    if best == min(tried):
        return [best / _FACTOR]
    if best == max(tried):
        return [best * _FACTOR]
    return []


def is_validation(record: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl has a validation loss."""
    return record["kind"] == "validation"
