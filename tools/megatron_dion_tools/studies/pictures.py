"""What a study found, drawn: curves, learning rates, and gaps between methods."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from megatron_dion_tools.studies.results import (
    SMOOTHED_OVER,
    CellResult,
    StudyResult,
    paired_differences,
)

_DPI = 150
_MOST_COLUMNS = 3
_STYLES = {  # colours of Okabe and Ito, which the colour-blind can tell apart
    "AdamW": ("#000000", "o"),
    "Muon": ("#E69F00", "s"),
    "Dion 1": ("#0072B2", "D"),
    "Dion 1/2": ("#56B4E9", "^"),
    "Dion 1/4": ("#009E73", "v"),
    "Dion 1/8": ("#D55E00", "P"),
    "Dion 1/16": ("#CC79A7", "X"),
}
"""Colour and marker of methods that occur in several studies; they are the same in all pictures."""
_DODGE = 1.03
"""Factor between the places of two methods, so that neither hides the other."""


def draw_all(result: StudyResult, folder: Path) -> list[Path]:
    """Draw all pictures of a study.

    Args:
        result: the study's result.
        folder: it gets `<study>_curves.png`, `<study>_rates.png` and, where there is more than one
            setting, `<study>_gaps.png`.

    Returns:
        The pictures' paths.
    """
    figures = {"curves": draw_curves(result), "rates": draw_rates(result)}
    if len(result.study.settings) > 1:
        figures["gaps"] = draw_gaps(result)
    paths = []
    for kind, figure in figures.items():
        paths.append(folder / f"{result.study.name}_{kind}.png")
        figure.savefig(paths[-1], dpi=_DPI)
    return paths


def draw_curves(result: StudyResult) -> Figure:
    """Training loss against steps, and against the time spent in the optimizer.

    A row for each setting (of many: the first, middle and last) and each of the study's panels,
    zoomed to the last two thirds of the steps.
    """
    names = list(result.study.settings)
    settings = [names[number] for number in sorted({0, len(names) // 2, len(names) - 1})]
    rows = [(setting, title) for setting in settings for title in result.study.panels]
    figure = Figure(figsize=(11, 4.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, sharey="row", squeeze=False)
    for (setting, title), (by_step, by_time) in zip(rows, grid, strict=True):
        cells = _cells(result, setting, title)
        for cell in sorted(cells, key=_last_loss, reverse=True):  # the legend's order is the lines'
            _draw_curve(by_step, result, cell, 1)
            _draw_curve(by_time, result, cell, cell.optimizer_seconds)
        _zoom(by_step, by_time, cells)
        _label_curves(by_step, by_time, cells[0])
        by_step.set_title(_title(result, setting, title), loc="left")
        by_step.legend(fontsize="small")
    return figure


def draw_rates(result: StudyResult) -> Figure:
    """Validation loss of the first seed against the learning rate.

    A panel for each setting, and that for each of the study's panels.
    """
    study = result.study
    places = [(setting, title) for title in study.panels for setting in study.settings]
    columns = min(_MOST_COLUMNS, len(study.settings))
    rows = math.ceil(len(places) / columns)
    figure = Figure(figsize=(3 + max(5, 3 * columns), 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for (setting, title), axes in zip(places, grid.flat, strict=False):
        for cell in _cells(result, setting, title):
            _draw_rates(axes, result, cell)
        axes.set_title(textwrap.fill(_title(result, setting, title), 32), fontsize="medium")
        axes.tick_params("x", labelrotation=45, labelbottom=True)
    for unused in grid.flat[len(places) :]:
        unused.set_axis_off()
    for row in grid:
        row[0].set_ylabel("validation loss (nats per token)")
        _legend_beside(row[-1], row[0])
    _ticks_at(grid[0, 0], sorted({rate.lr for cell in result.cells for rate in cell.rates}))
    _limit_losses(grid[0, 0], result)
    figure.supxlabel("learning rate of the matrices (○ best, × diverged)", fontsize="medium")
    return figure


def draw_gaps(result: StudyResult) -> Figure:
    """Validation loss minus the reference's, and the best learning rate, against the settings."""
    study = result.study
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    gaps, rates = figure.subplots(1, 2)
    for number, method in enumerate(study.methods):
        dodge = _DODGE ** (number - (len(study.methods) - 1) / 2)
        cells = [result.cell(setting, method) for setting in study.settings]
        if method != result.reference:
            _draw_gaps(gaps, result, cells, dodge)
        places = [dodge * float(cell.setting) for cell in cells]
        rates.plot(places, [dodge * cell.best_lr for cell in cells], **_style(result, method))
    gaps.axhline(0, color=_style(result, result.reference)["color"], linewidth=1)
    gaps.set_ylabel(f"validation loss minus that of {result.reference}\n(nats per token)")
    rates.set_ylabel("best learning rate of the matrices")
    rates.set_yscale("log", base=2)
    lrs = sorted({rate.lr for cell in result.cells for rate in cell.rates})
    rates.set_ylim(lrs[0] / 1.2, lrs[-1] * 1.2)
    rates.yaxis.set(major_locator=FixedLocator(lrs), major_formatter=StrMethodFormatter("{x:g}"))
    for axes in (gaps, rates):
        axes.set_xlabel(study.axis)
        _ticks_at(axes, [float(setting) for setting in study.settings])
        axes.grid(alpha=0.3)
    _legend_beside(rates, rates)
    return figure


@dataclass(frozen=True)
class _Band:
    """Smoothed training loss over seeds, each of shape (points,)."""

    iterations: tuple[int, ...]
    mean: list[float]
    low: list[float]
    high: list[float]


def _band(cell: CellResult) -> _Band:
    curves = list(cell.curves.values())
    points = list(zip(*(curve.loss for curve in curves), strict=True))
    return _Band(
        curves[0].iterations,
        [sum(losses) / len(losses) for losses in points],
        [min(losses) for losses in points],
        [max(losses) for losses in points],
    )


def _last_loss(cell: CellResult) -> float:
    loss = _band(cell).mean[-1]
    return loss if math.isfinite(loss) else math.inf


def _draw_curve(axes: Any, result: StudyResult, cell: CellResult, per_iteration: float) -> None:
    band = _band(cell)
    places = [per_iteration * iteration for iteration in band.iterations]
    style = _style(result, cell.method) | {"marker": ""}
    axes.plot(places, band.mean, **style, linewidth=1.5)
    axes.fill_between(places, band.low, band.high, color=style["color"], alpha=0.15, linewidth=0)


def _zoom(by_step: Any, by_time: Any, cells: Sequence[CellResult]) -> None:
    """Show the last two thirds of the steps, and the losses that occur in them."""
    steps, start = cells[0].steps, cells[0].steps / 3
    bands = [_band(cell) for cell in cells]
    losses = [
        loss
        for band in bands
        for iteration, *of_seeds in zip(band.iterations, band.low, band.high, strict=True)
        for loss in of_seeds
        if iteration >= start and math.isfinite(loss)
    ]
    margin = 0.05 * (max(losses) - min(losses))
    by_step.set_xlim(start, steps)
    by_step.set_ylim(min(losses) - margin, max(losses) + margin)
    seconds = [cell.optimizer_seconds for cell in cells]
    by_time.set_xscale("log")
    by_time.set_xlim(start * min(seconds), steps * max(seconds) * 1.1)


def _label_curves(by_step: Any, by_time: Any, cell: CellResult) -> None:
    by_step.set_xlabel("step")
    by_step.set_ylabel(f"training loss, mean of {SMOOTHED_OVER} steps\n(nats per token)")
    by_time.set_xlabel("time in the optimizer since the start (s)")
    by_time.xaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)),
        minor_locator=NullLocator(),
        major_formatter=StrMethodFormatter("{x:g}"),
    )
    per_step = cell.tokens / cell.steps / 1000
    functions = (lambda steps: steps * per_step, lambda tokens: tokens / per_step)
    by_step.secondary_xaxis("top", functions=functions).set_xlabel("thousand tokens")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)


def _draw_rates(axes: Any, result: StudyResult, cell: CellResult) -> None:
    first_seed = result.study.seeds[0]
    style = _style(result, cell.method)
    losses = {rate.lr: rate.validation_loss[first_seed] for rate in cell.rates}
    axes.plot(list(losses), list(losses.values()), **style, markersize=5, linewidth=1.3)
    best = losses[cell.best_lr]
    axes.plot(cell.best_lr, best, marker="o", markersize=12, fillstyle="none", color=style["color"])
    diverged = [lr for lr, loss in losses.items() if not math.isfinite(loss)]
    for lr in diverged:
        at_top = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(lr, 1, marker="x", color=style["color"], **at_top)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def _limit_losses(axes: Any, result: StudyResult) -> None:
    """Leave losses out that are so high that the rest could not be told apart."""
    best = [min(rate_losses) for cell in result.cells if (rate_losses := _finite_losses(cell))]
    every = [loss for cell in result.cells for loss in _finite_losses(cell)]
    top = min(max(every), max(best) + 2 * (max(best) - min(best)))
    margin = 0.05 * (top - min(best))
    axes.set_ylim(min(best) - margin, top + margin)


def _finite_losses(cell: CellResult) -> list[float]:
    losses = [loss for rate in cell.rates for loss in rate.validation_loss.values()]
    return [loss for loss in losses if math.isfinite(loss)]


def _draw_gaps(axes: Any, result: StudyResult, cells: Sequence[CellResult], dodge: float) -> None:
    """The mean over seeds, and bars from the lowest to the highest seed."""
    seeds = [_gaps(result, cell) for cell in cells]
    means = [sum(gaps) / len(gaps) for gaps in seeds]
    down = [mean - min(gaps) for mean, gaps in zip(means, seeds, strict=True)]
    up = [max(gaps) - mean for mean, gaps in zip(means, seeds, strict=True)]
    places = [dodge * float(cell.setting) for cell in cells]
    axes.errorbar(places, means, yerr=(down, up), **_style(result, cells[0].method), capsize=3)


def _gaps(result: StudyResult, cell: CellResult) -> list[float]:
    reference = result.cell(cell.setting, result.reference)
    return list(paired_differences(cell.validation_losses, reference.validation_losses).values())


def _ticks_at(axes: Any, places: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set(
        major_locator=FixedLocator(places),
        minor_locator=NullLocator(),
        major_formatter=StrMethodFormatter("{x:g}"),
    )


def _legend_beside(axes: Any, source: Any) -> None:
    """Say to the right of `axes` what the lines of `source` are."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    axes.legend(*source.get_legend_handles_labels(), fontsize="small", **place)


def _cells(result: StudyResult, setting: str, title: str) -> list[CellResult]:
    return [result.cell(setting, method) for method in result.study.panels[title]]


def _title(result: StudyResult, setting: str, title: str) -> str:
    return ", ".join(filter(None, (f"{result.study.axis} {setting}".strip(), title)))


def _style(result: StudyResult, method: str) -> dict[str, Any]:
    styles = list(_STYLES.values())
    by_place = styles[list(result.study.methods).index(method) % len(styles)]
    colour, marker = _STYLES.get(method.removesuffix(" orth"), by_place)
    return {"label": method, "color": colour, "marker": marker}
