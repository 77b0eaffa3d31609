"""Draws verdicts and studies."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from megatron_dion_tools.convergence.checks import Verdict
from megatron_dion_tools.convergence.curves import smoothed, window_of
from megatron_dion_tools.convergence.study import Result

_STYLES = [
    {"color": f"C{i}", "linestyle": dashes} for dashes in ("-", "--", ":") for i in range(10)
]
_NATS_SHOWN = 1.0


def draw_verdicts(title: str, verdicts: Sequence[Verdict]) -> Figure:
    """Draw the smoothed curves of runs over those of their references.

    A panel for each quantity. A cross marks where a run first goes wrong.
    """
    quantities = list(dict.fromkeys(verdict.quantity for verdict in verdicts))
    figure = Figure(figsize=(9, 1 + 4 * len(quantities)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(quantities), squeeze=False)[:, 0]
    for quantity, axes in zip(quantities, panels, strict=True):
        row = [verdict for verdict in verdicts if verdict.quantity == quantity]
        for name, curve in {verdict.reference: verdict.curves[1] for verdict in row}.items():
            _plot(axes, smoothed(curve, window_of(curve)), label=name, color="grey", linewidth=5)
        axes.set_ylim(*axes.get_ylim())  # A run that explodes must not flatten the others.
        for verdict, style in zip(row, cycle(_STYLES), strict=False):
            ours = smoothed(verdict.curves[0], window_of(verdict.curves[1]))
            _plot(axes, ours, label=verdict.run, **style)
            if verdict.divergent in ours:
                cross = {verdict.divergent: ours[verdict.divergent]}
                _plot(axes, cross, marker="X", color=style["color"], markersize=10)
        _finish(axes, "", "iteration", quantity)
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
