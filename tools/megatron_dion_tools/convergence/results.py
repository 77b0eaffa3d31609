"""What a study has found, as JSON and Markdown."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion_tools.convergence.environment import describe
from megatron_dion_tools.convergence.noise import smoothed, window_of
from megatron_dion_tools.convergence.study import StudyRuns, best_rate

Result = Mapping[str, Any]

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1 to 10.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_POINTS = 64  # of a curve in the result
_LEGEND = """\
* best `--lr`: that with the lowest validation loss of the first seed; \\*: not between two others.
* validation loss: nats per token after the last step, mean ± standard deviation over seeds.
* minus the baseline: paired by seed, mean ± half of the 95 % interval (Student's t).
* optimizer ms, iteration ms: median per step at the best rate, on a machine shared by runs."""


def estimate(values: Sequence[float]) -> dict[str, float]:
    """Return mean, sample standard deviation, and half of the 95 % interval of the mean.

    The last two are NaN for one value. The interval is a little too wide for more than eleven.
    """
    n, sd = len(values), math.nan
    if n > 1:  # `statistics.stdev` would raise where a value is not finite.
        sd = math.sqrt(statistics.variance(values))
    margin = _STUDENT_T[min(max(n - 1, 1), len(_STUDENT_T)) - 1] * sd / math.sqrt(n)
    return {"mean": statistics.fmean(values), "sd": sd, "margin": margin}


def collect(runs: StudyRuns) -> Result:
    """Return what a finished study has found, ready for JSON.

    A cell is a method in a setting at its best learning rate. Its `losses` are in nats per token by
    learning rate and seed, infinite where training diverged; `gap` is the loss minus the
    baseline's; seconds are medians per step; `curve` is the smoothed training loss.
    """
    study = runs.study
    return {
        "name": study.name,
        "question": study.question,
        "axis": study.axis,
        "baseline": study.baseline,
        "seeds": study.seeds,
        "common_flags": study.common_flags,
        "settings": study.settings,
        "methods": {name: method.flags for name, method in study.methods.items()},
        "environment": describe((*study.common_flags, *runs.data)),
        "cells": [
            _cell(runs, setting, name) for setting in study.settings for name in study.methods
        ],
    }


def _cell(runs: StudyRuns, setting: str, method: str) -> Result:
    study, losses = runs.study, runs.losses(setting, method)
    best, gap = best_rate(losses), None
    if study.baseline not in (None, method):
        theirs = runs.losses(setting, str(study.baseline))
        theirs_at_best = theirs[best_rate(theirs)]
        pairs = [loss - theirs_at_best[seed] for seed, loss in losses[best].items()]
        gap = estimate([pair if math.isfinite(pair) else math.nan for pair in pairs])
    folders = [runs.run(setting, method, best, seed).metrics for seed in study.seeds]
    records = [[r for r in read_metrics(path) if r["kind"] == "train"] for path in folders]
    curve = {r["iteration"]: r["lm_loss"] or math.nan for r in records[0]}
    points = list(smoothed(curve, window_of(curve)).items())
    return {
        "setting": setting,
        "method": method,
        "best_lr": best,
        "is_bracketed": min(losses) < best < max(losses),
        "losses": losses,
        "loss": estimate(list(losses[best].values())),
        "gap": gap,
        "steps": records[0][-1]["iteration"],
        "tokens": records[0][-1]["tokens"],
        "optimizer_seconds": _median(records, "optimizer_seconds"),
        "iteration_seconds": _median(records, "iteration_seconds"),
        "curve": dict(points[:: -(-len(points) // _POINTS)]),
    }


def _median(records: Sequence[Sequence[Result]], key: str) -> float:
    return statistics.median(record[key] for of_run in records for record in of_run)


def to_json(result: Result) -> str:
    """Write a result as JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps(result), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1) + "\n"


def to_markdown(result: Result) -> str:
    """Write the question, a table for each setting, and what the columns mean."""
    parts = [f"# {result['name']}", result["question"]]
    titles = ["method", "best `--lr`", "validation loss"]
    titles += [f"minus {result['baseline']}" if result["baseline"] else "gap"]
    titles += ["optimizer ms", "iteration ms", "validation loss by `--lr`, first seed"]
    for setting in result["settings"]:
        cells = [cell for cell in result["cells"] if cell["setting"] == setting]
        seeds = ", ".join(map(str, result["seeds"]))
        parts += [f"## {result['axis']} {setting}"] if setting else []
        parts.append(f"{cells[0]['steps']} steps, {cells[0]['tokens']} tokens, seeds {seeds}.")
        rows = [titles, ["---"] * len(titles), *map(_row, cells)]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join([*parts, _LEGEND]) + "\n"


def _row(cell: Result) -> Iterable[str]:
    rates = (f"{lr:g}: {_number(next(iter(of.values())))}" for lr, of in cell["losses"].items())
    return (
        cell["method"],
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
