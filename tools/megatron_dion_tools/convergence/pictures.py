"""Draws verdicts and studies."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from megatron_dion_tools.convergence.checks import Verdict
from megatron_dion_tools.convergence.curves import smoothed, window_of
from megatron_dion_tools.convergence.study import Result

# Okabe and Ito's colours, which people who are colour-blind can tell apart.
_COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"
_STYLES = [
    {"color": colour, "linestyle": dashes}
    for dashes in ("solid", "dashed", "dotted")
    for colour in _COLOURS
]

_NATS_SHOWN = 1.0


def draw_verdicts(title: str, verdicts: Sequence[Verdict]) -> Figure:
    """Draw curves, and how far each run is from its reference.

    A row of panels for each quantity: at the left the smoothed curves, at the right the smoothed
    distances on a logarithmic axis, dotted the allowed ones. A cross marks where a run first goes
    wrong.
    """
    quantities = list(dict.fromkeys(verdict.quantity for verdict in verdicts))
    figure = Figure(figsize=(14, 1 + 4 * len(quantities)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(quantities), 2, squeeze=False)
    for quantity, (left, right) in zip(quantities, panels, strict=True):
        row = [verdict for verdict in verdicts if verdict.quantity == quantity]
        references = {verdict.reference: verdict.curves[1] for verdict in row}
        for name, curve in references.items():
            _plot(left, smoothed(curve, window_of(curve)), label=name, color="grey", linewidth=5)
        left.set_ylim(*left.get_ylim())  # A run that explodes must not flatten the others.
        for verdict, style in zip(row, cycle(_STYLES), strict=False):
            ours, theirs = verdict.curves
            label = f"{verdict.run} ~ {verdict.reference}"
            _plot(left, smoothed(ours, window_of(theirs)), **style)
            distance = {i: abs(value) or math.nan for i, value in verdict.distance.items()}
            _plot(right, distance, label=label, **style)
            _plot(right, verdict.allowed, color=style["color"], linestyle="dotted")
            if verdict.divergent is not None:
                height = distance.get(verdict.divergent, math.nan)
                right.plot(verdict.divergent, height, "X", color=style["color"], markersize=10)
        _finish(left, "", "iteration", quantity)
        _finish(right, "", "iteration", f"distance in {quantity}")
        right.set_yscale("log")
    return figure


def draw_study(result: Result) -> Figure:
    """Draw the result of a study.

    A row of panels for each setting: validation loss against the learning rate with the first seed,
    and smoothed training loss at the best rate.
    """
    methods = dict(zip(result["methods"], cycle(_STYLES), strict=False))
    settings = list(dict.fromkeys(cell["setting"] for cell in result["cells"]))
    figure = Figure(figsize=(14, 4 * len(settings)), layout="constrained")
    panels = figure.subplots(len(settings), 2, squeeze=False)
    for setting, (left, right) in zip(settings, panels, strict=True):
        for cell in (cell for cell in result["cells"] if cell["setting"] == setting):
            style = {"label": cell["method"], **methods[cell["method"]]}
            by_rate = {lr: next(iter(of_seeds.values())) for lr, of_seeds in cell["losses"].items()}
            _plot(left, by_rate, marker="o", **style)
            _plot(right, cell["curve"], **style)
        _finish(left, setting, "learning rate", "validation loss (nats per token)")
        _finish(right, setting, "step", "training loss at the best rate")
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter("{x:g}")
        for axes in (left, right):  # Higher losses would hide how the others differ.
            losses = filter(math.isfinite, (y for line in axes.lines for y in line.get_ydata()))
            axes.set_ylim(top=min(axes.get_ylim()[1], min(losses, default=0.0) + _NATS_SHOWN))
    return figure


def _plot(axes: Any, points: Mapping[Any, float], **style: Any) -> None:
    axes.plot(list(points), list(points.values()), **style)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
