"""What a study found: the numbers of its finished runs, for tables, pictures and a JSON file."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_dion.megatron.run_directory import Record, read_metrics
from megatron_dion_tools.convergence.noise import estimate
from megatron_dion_tools.studies.study import Cell, Study, Trial, Trials, is_validation, missing

SMOOTHED_OVER = 16
"""Iterations of a trailing mean."""
_THINNED_BY = 8
"""Iterations from one point of a kept curve to the next."""
_CURVE_DIGITS = 6


class StudyUnfinished(Exception):
    """Runs of a study are missing; names the cells and their learning rates."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; not a number where they do not exist."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Curve:
    """How one run went. Losses are in nats per token.

    Attributes:
        iterations: of training loss and gradient norm, shape (points,).
        loss: training loss, mean over the last `SMOOTHED_OVER` iterations, shape (points,).
        grad_norm: before clipping, mean over the same iterations, shape (points,).
        validation_iterations: of the validation loss, shape (evaluations,).
        validation_loss: shape (evaluations,).
    """

    iterations: tuple[int, ...]
    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    validation_iterations: tuple[int, ...]
    validation_loss: tuple[float, ...]


@dataclass(frozen=True)
class Rate:
    """A learning rate that was tried, and the final validation loss by seed (nats per token)."""

    lr: float
    validation_loss: Mapping[int, float]


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline: same setting, same seeds, each at its own best rate.

    Attributes:
        differences: final validation loss minus the baseline's, by seed, in nats per token.
        difference: their mean and standard deviation.
        margin: half the width of the mean's 95 % t interval; infinite for one seed.
        step_shares: by seed, the first step from which on the smoothed training loss stays at or
            below the baseline's last, as a share of all steps; None where it ends above.
        step_share: their mean and standard deviation, where no seed has None.
    """

    differences: Mapping[int, float]
    difference: Spread
    margin: float
    step_shares: Mapping[int, float | None]
    step_share: Spread


@dataclass(frozen=True)
class CellResult:
    """What a method reached in a setting.

    Attributes:
        setting: its name.
        method: its name.
        rates: all learning rates tried, ascending; the first seed has a loss at each.
        best_lr: the learning rate with the lowest loss of the first seed.
        is_bracketed: whether rates below and above the best were tried, too.
        validation_losses: after the last iteration at the best rate, by seed (nats per token);
            infinite where training diverged.
        validation_loss: their mean and standard deviation.
        tokens: trained on by each run.
        steps: of each run.
        optimizer_seconds: per step, median over all steps and seeds at the best rate.
        iteration_seconds: per step, likewise.
        curves: at the best rate, by seed.
        comparison: with the baseline; None for the baseline itself, and without one.
    """

    setting: str
    method: str
    rates: tuple[Rate, ...]
    best_lr: float
    is_bracketed: bool
    validation_losses: Mapping[int, float]
    validation_loss: Spread
    tokens: int
    steps: int
    optimizer_seconds: float
    iteration_seconds: float
    curves: Mapping[int, Curve]
    comparison: Comparison | None


@dataclass(frozen=True)
class StudyResult:
    """All that a study found.

    Attributes:
        study: what was asked.
        cells: by setting and, within it, by method.
        environment: where and from what the runs were made.
        commands: that make the runs and this result.
    """

    study: Study
    cells: tuple[CellResult, ...]
    environment: Mapping[str, Any]
    commands: tuple[str, ...]

    def cell(self, setting: str, method: str) -> CellResult:
        """The result of a method in a setting."""
        return next(c for c in self.cells if (c.setting, c.method) == (setting, method))

    @property
    def reference(self) -> str:
        """The method that differences are drawn against: the baseline, or else the first."""
        return self.study.baseline or next(iter(self.study.methods))


def collect(trials: Trials, environment: Mapping[str, Any]) -> StudyResult:
    """Read all runs of a finished study.

    Args:
        trials: the study's runs.
        environment: what is known of machine and data; the runs' software is added.

    Raises:
        StudyUnfinished: runs are missing.
    """
    study = trials.study
    cells = [Cell(setting, method) for setting in study.settings for method in study.methods]
    _require_finished(trials, cells)
    return StudyResult(
        study=study,
        cells=tuple(_cell_result(trials, cell) for cell in cells),
        environment={**environment, **_software(trials, cells)},
        commands=tuple(
            f".venv/bin/megatron-dion study {action} studies/{study.name}.yaml"
            for action in ("run", "report")
        ),
    )


def to_json(result: StudyResult) -> str:
    """Write a result as JSON, the same text for the same runs; infinite and NaN become null."""
    study = result.study
    content = {
        "study": study.name,
        "question": study.question,
        "axis": study.axis,
        "baseline": study.baseline,
        "seeds": study.seeds,
        "common_flags": study.common,
        "settings": study.settings,
        "methods": {name: method.flags for name, method in study.methods.items()},
        "environment": result.environment,
        "commands": result.commands,
        "cells": [asdict(cell) for cell in result.cells],
    }
    text = json.dumps(_without_infinities(content), indent=1, sort_keys=True, allow_nan=False)
    return text + "\n"


def spread(values: Iterable[float | None]) -> Spread:
    """Mean and sample standard deviation; with a None, neither is a number."""
    known = [math.nan if value is None else value for value in values]
    has_deviation = len(known) > 1 and all(map(math.isfinite, known))
    sd = statistics.stdev(known) if has_deviation else math.nan
    return Spread(statistics.fmean(known), sd)


def paired_differences(
    losses: Mapping[int, float], reference: Mapping[int, float]
) -> dict[int, float]:
    """Losses minus the reference's, by seed; not a number where one of them is infinite."""
    differences = {seed: loss - reference[seed] for seed, loss in losses.items()}
    return {s: d if math.isfinite(d) else math.nan for s, d in differences.items()}


def trailing_means(values: Sequence[float]) -> list[float]:
    """Means over the last `SMOOTHED_OVER` values, from the first full window on."""
    ends = range(SMOOTHED_OVER, len(values) + 1)
    return [statistics.fmean(values[end - SMOOTHED_OVER : end]) for end in ends]


def steps_to_loss(losses: Sequence[float], target: float) -> int | None:
    """The first step from which on the smoothed loss stays at or below the target.

    Args:
        losses: of every step, shape (steps,).
        target: a smoothed loss.

    Returns:
        The step, counted from one; None where the smoothed loss ends above the target.
    """
    smoothed = enumerate(trailing_means(losses), start=SMOOTHED_OVER)
    # "not at or below" and not "above": a loss that is not a number is not below anything.
    last_above = max((step for step, loss in smoothed if not loss <= target), default=0)
    if last_above == len(losses):
        return None
    return max(last_above + 1, SMOOTHED_OVER)


def _require_finished(trials: Trials, cells: Sequence[Cell]) -> None:
    lines = []
    for cell in cells:
        if wanted := missing(trials, cell):
            runs = ", ".join(f"lr {trial.lr:g} seed {trial.seed}" for trial in wanted)
            lines.append(f"  {', '.join(filter(None, (cell.setting, cell.method)))}: {runs}")
    if lines:
        name = trials.study.name
        raise StudyUnfinished(
            f"{name} is not finished: {len(lines)} of {len(cells)} cells need runs, "
            "and perhaps more after them\n" + "\n".join(lines)
        )


def _cell_result(trials: Trials, cell: Cell) -> CellResult:
    records = _records_at_best(trials, cell)
    steps = [record for one in records.values() for record in _training(one)]
    rates = _rates(trials, cell)
    best_lr = trials.best_rate(cell)
    losses = _losses_at_best(trials, cell)
    return CellResult(
        setting=cell.setting,
        method=cell.method,
        rates=rates,
        best_lr=best_lr,
        is_bracketed=rates[0].lr < best_lr < rates[-1].lr,
        validation_losses=losses,
        validation_loss=spread(losses.values()),
        tokens=steps[-1]["tokens"],
        steps=steps[-1]["iteration"],
        optimizer_seconds=statistics.median(step["optimizer_seconds"] for step in steps),
        iteration_seconds=statistics.median(step["iteration_seconds"] for step in steps),
        curves={seed: _curve(one) for seed, one in records.items()},
        comparison=_comparison(trials, cell),
    )


def _comparison(trials: Trials, cell: Cell) -> Comparison | None:
    if trials.study.baseline in (None, cell.method):
        return None
    baseline = replace(cell, method=str(trials.study.baseline))
    differences = paired_differences(
        _losses_at_best(trials, cell), _losses_at_best(trials, baseline)
    )
    step_shares = _step_shares(_records_at_best(trials, cell), _records_at_best(trials, baseline))
    return Comparison(
        differences=differences,
        difference=spread(differences.values()),
        margin=estimate(list(differences.values())).margin,
        step_shares=step_shares,
        step_share=spread(step_shares.values()),
    )


def _step_shares(
    records: Mapping[int, Sequence[Record]], baseline: Mapping[int, Sequence[Record]]
) -> dict[int, float | None]:
    shares: dict[int, float | None] = {}
    for seed in records:
        losses, target = _losses(records[seed]), trailing_means(_losses(baseline[seed]))[-1]
        step = steps_to_loss(losses, target)
        shares[seed] = None if step is None else step / len(losses)
    return shares


def _rates(trials: Trials, cell: Cell) -> tuple[Rate, ...]:
    losses: dict[float, dict[int, float]] = {}
    for trial in trials.done(cell):
        losses.setdefault(trial.lr, {})[trial.seed] = trials.loss(trial)
    return tuple(Rate(lr, by_seed) for lr, by_seed in losses.items())


def _best_trials(trials: Trials, cell: Cell) -> dict[int, Trial]:
    lr = trials.best_rate(cell)
    return {seed: Trial(cell, lr, seed) for seed in trials.study.seeds}


def _losses_at_best(trials: Trials, cell: Cell) -> dict[int, float]:
    return {seed: trials.loss(trial) for seed, trial in _best_trials(trials, cell).items()}


def _records_at_best(trials: Trials, cell: Cell) -> dict[int, list[Record]]:
    best = _best_trials(trials, cell)
    return {seed: read_metrics(trials.run(trial).metrics) for seed, trial in best.items()}


def _training(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "train"]


def _losses(records: Sequence[Record]) -> list[float]:
    return [_number(record["lm_loss"]) for record in _training(records)]


def _curve(records: Sequence[Record]) -> Curve:
    training = _training(records)
    validation = [record for record in records if is_validation(record)]
    grad_norms = [_number(record["grad_norm"]) for record in training]
    return Curve(
        iterations=_thinned([record["iteration"] for record in training[SMOOTHED_OVER - 1 :]]),
        loss=_rounded(_thinned(trailing_means(_losses(records)))),
        grad_norm=_rounded(_thinned(trailing_means(grad_norms))),
        validation_iterations=tuple(record["iteration"] for record in validation),
        validation_loss=_rounded([_number(record["lm_loss"]) for record in validation]),
    )


def _thinned[T](values: Sequence[T]) -> tuple[T, ...]:
    return tuple(values[::_THINNED_BY])


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_CURVE_DIGITS}g}") for value in values)


def _number(value: float | None) -> float:
    """What the recorder says of a loss: None where the iteration was skipped."""
    return math.nan if value is None else value


def _software(trials: Trials, cells: Sequence[Cell]) -> dict[str, Any]:
    """What the runs say they were made with; a list where that is not the same for all."""
    runs = [trials.run(trial) for cell in cells for trial in trials.done(cell)]
    configs = [json.loads((run.folder / "config.json").read_text()) for run in runs]
    software: dict[str, Any] = {}
    for key in ("git_revision", "platform", "versions"):
        found = {json.dumps(config[key], sort_keys=True) for config in configs}
        values = [json.loads(text) for text in sorted(found)]
        software[key] = values[0] if len(values) == 1 else values
    return software


def _without_infinities(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
