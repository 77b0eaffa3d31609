"""Studies: methods compared in settings, each at its own best learning rate, over seeds."""

import hashlib
import itertools
import json
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion_tools.convergence.curves import smoothed, window_of
from megatron_dion_tools.convergence.environment import describe
from megatron_dion_tools.convergence.training_file import Flags, TrainingFile, read_training_file
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.flags import effective
from megatron_dion_tools.local.runs import Run, execute

_MOST_RATES = 8
"""A loss that still falls after so many doublings is not a matter of the learning rate."""
# Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1 to 10.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_POINTS = 64  # of a curve in the result
_LEGEND = """\
* best `--lr`: that with the lowest validation loss of the first seed; \\*: not between two others.
  Behind the name of a method with variants is the best of them.
* validation loss: nats per token after the last step, mean ± standard deviation over seeds.
* minus the baseline: paired by seed, mean ± half of the 95 % interval (Student's t).
* optimizer ms, iteration ms: median per step at the best rate, on a machine shared by runs."""

Losses = dict[float, dict[int, float]]
"""Final validation loss (nats per token) by learning rate, ascending, and by seed."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        lr: The learning rate with which its sweep begins.
        flags: Flags of pretrain_gpt.py.
        variants: Flags of which it takes the best, by name, such as several momenta. The learning
            rate is swept with each.
        processes: Number of ranks.
    """

    lr: float
    flags: Flags = ()
    variants: Mapping[str, Flags] = field(default_factory=lambda: {"": ()})
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Study(TrainingFile):
    """A question, and the runs that answer it.

    Attributes:
        question: What is asked.
        methods: The methods, by name.
        axes: What else varies: flags by value, by name of the axis. Every method is swept at every
            combination of values.
        rates: Learning rates as multiples of each method's first one, at which all seeds train.
            Without them, the first seed trains at the first rate, its double, its half, and so on
            until the best rate lies between two others; then the other seeds train at the best of
            the best variant.
        baseline: The method with which all others are compared.
    """

    question: str
    methods: Mapping[str, Method]
    axes: Mapping[str, Mapping[str, Flags]] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    baseline: str | None = None

    @property
    def settings(self) -> dict[str, Flags]:
        """The flags of each combination of the axes' values, by its name."""
        settings = {}
        for values in itertools.product(*self.axes.values()):
            pairs = list(zip(self.axes, values, strict=True))
            flags = itertools.chain(*(self.axes[axis][value] for axis, value in pairs))
            settings[", ".join(f"{axis} {value}" for axis, value in pairs)] = tuple(flags)
        return settings


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
    on where it stopped. `pool` has the runs of all studies.
    """

    def __init__(self, study: Study, pool: Path) -> None:
        self.study = study
        self.data = study.prepare_data()
        self._pool = pool
        self._cells = list(itertools.product(study.settings, study.methods))

    def train(self, jobs: int, report: Callable[[str], None]) -> None:
        """Train all runs that the study needs and that are not finished, `jobs` at a time.

        Raises:
            RunFailed: A run failed.
        """
        # By folder: two methods may need the same run.
        while missing := {run.folder: run for cell in self._cells for run in self.missing(*cell)}:
            report(f"{self.study.name}:")
            execute(list(missing.values()), jobs, report)

    def run(self, setting: str, method: str, variant: str, lr: float, seed: int) -> Run:
        """Return a run of the study."""
        how = self.study.methods[method]
        flags = (*self.study.common_flags, *self.study.settings[setting], *how.flags)
        rates = ("--lr", f"{lr:g}", "--min-lr", f"{lr / 10:g}")
        flags = (*flags, *how.variants[variant], *rates, "--seed", str(seed))
        flags = effective((*flags, *self.data))
        key = shlex.join(flags) + (f" on {how.processes} ranks" if how.processes > 1 else "")
        digest = hashlib.sha256(key.encode()).hexdigest()
        name = f"{setting}, {method} {variant}".removeprefix(", ").rstrip()
        name = f"{name}, lr {lr:g}, seed {seed}"
        return Run(name, self._pool / digest[:16], flags, how.processes)

    def losses(self, setting: str, method: str, variant: str = "") -> Losses:
        """Return the losses of finished runs, infinite where training diverged.

        Only learning rates with which the first seed has trained count.
        """
        first = self.study.methods[method].lr
        multiples = {2.0**power for power in range(-_MOST_RATES, _MOST_RATES + 1)}
        losses: Losses = {}
        for lr in sorted(first * multiple for multiple in multiples | set(self.study.rates)):
            runs = {s: self.run(setting, method, variant, lr, s) for s in self.study.seeds}
            if runs[self.study.seeds[0]].is_finished():
                losses[lr] = {s: _loss(run) for s, run in runs.items() if run.is_finished()}
        return losses

    def missing(self, setting: str, method: str) -> list[Run]:
        """Return the runs that a method needs next in a setting; none when it is finished."""
        study, variants = self.study, self.study.methods[method].variants
        runs = [run for each in variants for run in self._sweep(setting, method, each)]
        if not runs:
            _, variant, lr = self.best(setting, method)
            runs = [self.run(setting, method, variant, lr, seed) for seed in study.seeds]
        return [run for run in runs if not run.is_finished()]

    def best(self, setting: str, method: str) -> tuple[dict[str, Losses], str, float]:
        """Return the losses of all variants, the best variant, and its best learning rate."""
        swept = {v: self.losses(setting, method, v) for v in self.study.methods[method].variants}
        rates = {v: best_rate(losses) for v, losses in swept.items()}
        best = min(rates, key=lambda v: _of_first_seed(swept[v][rates[v]]))
        return swept, best, rates[best]

    def _sweep(self, setting: str, method: str, variant: str) -> list[Run]:
        """The runs that the sweep of a variant needs next."""
        study, first = self.study, self.study.methods[method].lr
        rates = [first * m for m in study.rates] or [first / 2, first, first * 2]
        seeds = study.seeds if study.rates else study.seeds[:1]
        losses = self.losses(setting, method, variant)
        if not study.rates and set(rates) <= set(losses):
            best = best_rate(losses)
            next_rate = {min(losses): best / 2, max(losses): best * 2}.get(best)
            rates = [next_rate] if next_rate and len(losses) < _MOST_RATES else []
        runs = [self.run(setting, method, variant, lr, seed) for lr in rates for seed in seeds]
        return [run for run in runs if not run.is_finished()]

    def result(self) -> Result:
        """Return the results of the finished study, ready for JSON.

        A cell is a method in a setting, at the best learning rate of its best variant. Its `losses`
        are by learning rate and seed, `others` those of its other variants; `gap` is the loss minus
        the baseline's; seconds are medians per step; `curve` is the smoothed training loss.
        """
        study = self.study
        return {
            "name": study.name,
            "question": study.question,
            "baseline": study.baseline,
            "seeds": study.seeds,
            "common_flags": study.common_flags,
            "axes": study.axes,
            "methods": {name: asdict(method) for name, method in study.methods.items()},
            "environment": describe((*study.common_flags, *self.data)),
            "cells": [self._cell(*cell) for cell in self._cells],
        }

    def _cell(self, setting: str, method: str) -> Result:
        study, gap = self.study, None
        others, variant, best = self.best(setting, method)
        losses = others.pop(variant)
        if study.baseline not in (None, method):
            swept, their_variant, their_best = self.best(setting, str(study.baseline))
            theirs = swept[their_variant][their_best]
            pairs = [loss - theirs[seed] for seed, loss in losses[best].items()]
            gap = estimate([pair if math.isfinite(pair) else math.nan for pair in pairs])
        runs = [self.run(setting, method, variant, best, seed) for seed in study.seeds]
        records = [[r for r in read_metrics(run.metrics) if r["kind"] == "train"] for run in runs]
        curve = {r["iteration"]: r["lm_loss"] or math.nan for r in records[0]}
        points = list(smoothed(curve, window_of(curve)).items())
        return {
            "setting": setting,
            "method": method,
            "variant": variant,
            "best_lr": best,
            "is_bracketed": min(losses) < best < max(losses),
            "losses": losses,
            "others": others,
            "loss": estimate(list(losses[best].values())),
            "gap": gap,
            "steps": records[0][-1]["iteration"],
            "tokens": records[0][-1]["tokens"],
            **{
                key: statistics.median(record[key] for record in itertools.chain(*records))
                for key in ("optimizer_seconds", "iteration_seconds")
            },
            "curve": dict(points[:: -(-len(points) // _POINTS)]),
        }


def best_rate(losses: Losses) -> float:
    """Return the learning rate with the lowest loss of the first seed."""
    return min(losses, key=lambda lr: _of_first_seed(losses[lr]))


def estimate(values: Sequence[float]) -> dict[str, float]:
    """Return mean, sample standard deviation, and half of the 95 % interval of the mean.

    The last two are NaN for one value. The interval is a little too wide for more than eleven.
    """
    n, sd = len(values), math.nan
    if n > 1:  # `statistics.stdev` would raise where a value is not finite.
        sd = math.sqrt(statistics.variance(values))
    margin = _STUDENT_T[min(max(n - 1, 1), len(_STUDENT_T)) - 1] * sd / math.sqrt(n)
    return {"mean": statistics.fmean(values), "sd": sd, "margin": margin}


def to_json(result: Result) -> str:
    """Write a result as JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps(result), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1) + "\n"


def to_markdown(result: Result) -> str:
    """Write the question, a table for each setting, and what the columns mean."""
    parts = [f"# {result['name']}", result["question"]]
    titles = ["method", "best `--lr`", "validation loss", f"minus {result['baseline'] or '-'}"]
    titles += ["optimizer ms", "iteration ms", "validation loss by `--lr`, first seed"]
    seeds = ", ".join(map(str, result["seeds"]))
    for setting, group in itertools.groupby(result["cells"], lambda cell: cell["setting"]):
        parts += [f"## {setting}"] if setting else []
        cells = list(group)
        parts.append(f"{cells[0]['steps']} steps, {cells[0]['tokens']} tokens, seeds {seeds}.")
        rows = [titles, ["---"] * len(titles), *map(_row, cells)]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join([*parts, _LEGEND]) + "\n"


def _row(cell: Result) -> Sequence[str]:
    swept = {"": cell["losses"], **cell["others"]}
    rates = (
        f"{name} {lr:g}: {_number(_of_first_seed(of))}".lstrip()
        for name, losses in swept.items()
        for lr, of in losses.items()
    )
    return (
        f"{cell['method']} {cell['variant']}".rstrip(),
        f"{cell['best_lr']:g}" + ("" if cell["is_bracketed"] else "\\*"),
        _number(cell["loss"]["mean"], cell["loss"]["sd"]),
        _number(cell["gap"]["mean"], cell["gap"]["margin"], "+") if cell["gap"] else "",
        f"{1000 * cell['optimizer_seconds']:.1f}",
        f"{1000 * cell['iteration_seconds']:.0f}",
        "; ".join(rates),
    )


def _number(mean: float, spread: float = math.nan, sign: str = "") -> str:
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:{sign}.3f}" + (f" ± {spread:.3f}" if math.isfinite(spread) else "")


def _of_first_seed(losses: Mapping[int, float]) -> float:
    return next(iter(losses.values()))


def _loss(run: Run) -> float:
    losses = [r["lm_loss"] for r in read_metrics(run.metrics) if r["kind"] == "validation"]
    return losses[-1] if losses and math.isfinite(losses[-1] or math.nan) else math.inf
