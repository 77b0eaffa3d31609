"""Verdicts, drawn: whether curves lie on top of each other, and where one leaves its band."""

import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from megatron_dion_tools.convergence.checks import Verdict, without_seed
from megatron_dion_tools.convergence.curves import GRAD_NORM, LOSS, VALIDATION_LOSS, Curve
from megatron_dion_tools.convergence.evaluation import Outcome
from megatron_dion_tools.convergence.noise import smoothed

_DPI = 120
_COLOURS = (  # of Okabe and Ito, which the colour-blind can tell apart
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
)
_DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)))
_REFERENCE = {"linewidth": 6, "alpha": 0.4, "zorder": 1, "solid_capstyle": "butt"}
_WIDEST, _NARROWEST, _IN_LEGEND = 3.0, 1.0, 2.0
_NAMES = {
    LOSS: ("training loss", "nats per token"),
    GRAD_NORM: ("gradient norm", ""),
    VALIDATION_LOSS: ("validation loss", "nats per token"),
    "lr": ("learning rate", ""),
}
_BANDS_SHOWN = 4.0
"""Half the height of a panel of bands, in bands: what is farther away has left for certain."""
_DECADES_SHOWN, _DECADES_NAMED = 12, 6
"""At most, on a logarithmic axis."""
_FEW_POINTS = 12
"""Of a curve, that are marked one by one: a single one would not be seen as a line."""
_LEGEND_LETTERS = 150
"""That fit beside each other under a figure."""

_EXACT, _BAND, _BELOW = "exact", "band", "below"
_TITLES = {
    _EXACT: "distance of runs that must be equal",
    _BAND: "run minus reference, and how far it may be",
    _BELOW: "run minus reference, which must be below 0",
}

Style = Mapping[str, Any]


def draw_case(outcome: Outcome) -> Figure:
    """Draw the curves of a case and how far they are from what they are held against.

    Args:
        outcome: with one verdict or more.
    """
    return _draw(outcome.verdicts, outcome.case.name)


def draw_controls(outcome: Outcome) -> Figure | None:
    """Draw the runs with a known mistake, which should leave their bands; None without any."""
    if not outcome.controls:
        return None
    return _draw(outcome.controls, f"{outcome.case.name}: runs with a known mistake")


def draw_comparison(verdicts: Sequence[Verdict]) -> Figure:
    """Draw runs that were compared.

    Args:
        verdicts: one or more.
    """
    return _draw(verdicts, "")


def png(figure: Figure) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _draw(verdicts: Sequence[Verdict], title: str) -> Figure:
    """A row for each quantity and kind of check: curves on the left, differences on the right."""
    quantities = dict.fromkeys(verdict.quantity for verdict in verdicts)
    rows = [
        (kind, row)
        for quantity in quantities
        for kind in _TITLES
        if (row := [v for v in verdicts if (v.quantity, _kind(v)) == (quantity, kind)])
    ]
    figure = Figure(figsize=(12, 1 + 3.2 * len(rows)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), 2, sharex=True, squeeze=False)
    styles = _styles(verdicts)
    for (kind, row), (left, right) in zip(rows, grid, strict=True):
        in_row = _with_widths(row, styles)
        _draw_curves(left, row, in_row)
        _draw_differences(right, kind, row, in_row)
    for axes in grid[-1]:
        axes.set_xlabel("iteration")
    _legend(figure, grid.flat)
    return figure


def _kind(verdict: Verdict) -> str:
    if verdict.band is not None:
        return _BAND
    return _EXACT if len(verdict.curves) == 2 else _BELOW


def _pairs(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """The names of each run and of what it is held against."""
    names = list(verdict.curves)
    return zip(names[::2], names[1::2], strict=True)


def _styles(verdicts: Sequence[Verdict]) -> dict[str, Style]:
    """Label, colour and dashes of each curve, by its name; the seeds of a run share them."""
    several_seeds = any(_kind(verdict) == _BELOW for verdict in verdicts)
    labels = {
        name: without_seed(name) if several_seeds else name
        for verdict in verdicts
        for name in verdict.curves
    }
    runs = dict.fromkeys(labels[run] for verdict in verdicts for run, _ in _pairs(verdict))
    styles = {
        label: {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        }
        for number, label in enumerate(runs)
    }
    return {
        name: {"label": label, **styles.get(label, {"color": "grey"})}
        for name, label in labels.items()
    }


def _with_widths(verdicts: Sequence[Verdict], styles: Mapping[str, Style]) -> dict[str, Style]:
    """Adds widths, with which curves that lie on top of each other can all be seen.

    What others are held against is broad and pale; those get narrower in the order of drawing.
    """
    runs = dict.fromkeys(styles[run]["label"] for one in verdicts for run, _ in _pairs(one))
    step = (_WIDEST - _NARROWEST) / max(1, len(runs) - 1)
    widths = {
        label: {"linewidth": _WIDEST - step * number, "zorder": 2 + number / len(runs)}
        for number, label in enumerate(runs)
    }
    return {
        name: {**style, **widths.get(style["label"], _REFERENCE)} for name, style in styles.items()
    }


def _draw_curves(axes: Any, verdicts: Sequence[Verdict], styles: Mapping[str, Style]) -> None:
    curves: dict[str, Curve] = {}
    for verdict in verdicts:
        for name, curve in verdict.curves.items():
            curves[name] = max(curves.get(name, {}), curve, key=len)
    averaged = max(map(_averaged, verdicts))
    curves = {name: _complete_means(curve, averaged) for name, curve in curves.items()}
    for name, curve in curves.items():
        _plot(axes, curve, styles[name])
    references = {reference for verdict in verdicts for _, reference in _pairs(verdict)}
    _limit_curves(axes, curves, references)
    axes.set_title("curves", loc="left", fontsize="medium")
    _label(axes, verdicts[0].quantity, averaged, "")


def _averaged(verdict: Verdict) -> int:
    """Number of iterations over which the curves of a verdict are averaged."""
    *_, reference = verdict.curves.values()
    return 1 if verdict.window == 1 else round(verdict.window * _spacing(reference))


def _spacing(curve: Curve) -> float:
    """Number of iterations from one point of a curve to the next."""
    return (max(curve) - min(curve)) / (len(curve) - 1) if len(curve) > 1 else 1.0


def _complete_means(curve: Curve, iterations: int) -> Curve:
    """Without means over fewer points, with which a resumed run would seem to start elsewhere."""
    window = min(len(curve), max(1, round(iterations / _spacing(curve))))
    return dict(list(smoothed(curve, window).items())[max(0, window - 1) :])


def _plot(axes: Any, curve: Curve, style: Style) -> None:
    marker = "o" if len(curve) <= _FEW_POINTS else ""
    axes.plot(list(curve), list(curve.values()), **style, marker=marker, markersize=4)


def _limit_curves(axes: Any, curves: Mapping[str, Curve], references: Iterable[str]) -> None:
    """Show the references and what comes near; a run that explodes would flatten all others."""
    expected = _finite(value for name in references for value in curves[name].values())
    drawn = _finite(value for curve in curves.values() for value in curve.values())
    if not expected:
        return
    span = max(expected) - min(expected) or abs(max(expected)) or 1.0
    low = max(min(drawn), min(expected) - span / 2)
    high = min(max(drawn), max(expected) + span / 2)
    axes.set_ylim(low - 0.05 * span, high + 0.05 * span)


@dataclass(frozen=True)
class _Line:
    """A difference to draw.

    Attributes:
        run: name of the curve from which another was subtracted.
        points: smoothed differences by iteration.
        divergent: the first iteration at which they were too large, if there is one.
    """

    run: str
    points: Curve
    divergent: int | None


def _draw_differences(
    axes: Any, kind: str, verdicts: Sequence[Verdict], styles: Mapping[str, Style]
) -> None:
    lines = [line for verdict in verdicts for line in _lines(verdict)]
    values = _finite(value for line in lines for value in line.points.values())
    if kind == _EXACT:
        _scale_exact(axes, values)
    elif kind == _BAND:
        _draw_bands(axes, [verdict.band for verdict in verdicts if verdict.band], values)
    axes.axhline(0, color="grey", linewidth=0.8)
    for line in lines:
        style = styles[line.run] if kind == _EXACT else {**styles[line.run], "linewidth": 1.2}
        _plot(axes, line.points, style)
    for line in lines:
        _mark(axes, line, styles[line.run]["color"])
    _name_iterations(axes, [line.divergent for line in lines if line.divergent is not None])
    axes.set_title(_TITLES[kind], loc="left", fontsize="medium")
    prefix = "distance of " if kind == _EXACT else "difference of "
    _label(axes, verdicts[0].quantity, max(map(_averaged, verdicts)), prefix)


def _lines(verdict: Verdict) -> Iterator[_Line]:
    for run, reference in _pairs(verdict):
        ours, theirs = verdict.curves[run], verdict.curves[reference]
        difference = {i: ours[i] - theirs[i] for i in ours if i in theirs}
        points = smoothed(difference, verdict.window)
        if _kind(verdict) == _EXACT:  # larger or smaller, both are wrong
            points = {i: abs(value) for i, value in points.items()}
        yield _Line(run, points, verdict.divergent)


def _scale_exact(axes: Any, distances: Sequence[float]) -> None:
    """Logarithmic, but with a zero: a distance in the last bit is as visible as a large one."""
    different = [distance for distance in distances if distance]
    if not different:
        axes.set(ylim=(-1, 1), yticks=[0], yticklabels=["0"])
        axes.annotate("equal in all iterations", (0.5, 0.55), xycoords="axes fraction", ha="center")
        return
    highest = math.ceil(math.log10(max(different)))
    lowest = math.floor(math.log10(min(different)))
    lowest = min(max(lowest, highest - _DECADES_SHOWN), highest - 1)
    axes.set_yscale("symlog", linthresh=10.0**lowest)
    axes.set_ylim(-0.15 * 10.0**lowest, 1.5 * 10.0**highest)
    exponents = range(lowest, highest + 1, math.ceil((highest - lowest + 1) / _DECADES_NAMED))
    axes.yaxis.set(
        major_locator=FixedLocator([0, *(10.0**exponent for exponent in exponents)]),
        major_formatter=FixedFormatter(["0", *(f"$10^{{{exponent}}}$" for exponent in exponents)]),
        minor_locator=NullLocator(),
    )


def _draw_bands(axes: Any, bands: Sequence[Curve], differences: Sequence[float]) -> None:
    """Shade what is allowed, each band once, and limit the panel so that bands can be seen."""
    for number, band in enumerate(bands):
        if band not in bands[:number]:
            half = list(band.values())
            limits = list(band), [-width for width in half], half
            axes.fill_between(*limits, color="#F0E442", alpha=0.45, linewidth=0, label="allowed")
    typical = statistics.median([width for band in bands for width in band.values()])
    farthest = max(map(abs, differences), default=0.0)
    height = max(1.3 * typical, min(1.1 * farthest, _BANDS_SHOWN * typical))
    if height:
        axes.set_ylim(-height, height)


def _mark(axes: Any, line: _Line, colour: str) -> None:
    """A line and a marker where a run first went wrong; on top where it has no number there."""
    if line.divergent is None:
        return
    low, high = axes.get_ylim()
    value = line.points.get(line.divergent, math.nan)
    height = min(max(value, low), high) if math.isfinite(value) else high
    axes.axvline(line.divergent, color=colour, linestyle=":", linewidth=1.2)
    axes.plot(
        line.divergent,
        height,
        marker="X",
        markersize=10,
        color=colour,
        markeredgecolor="white",
        clip_on=False,
        zorder=5,
    )


def _name_iterations(axes: Any, iterations: Sequence[int]) -> None:
    first, last = axes.get_xlim()
    for number, iteration in enumerate(sorted(set(iterations))):
        in_left_half = iteration < (first + last) / 2
        axes.annotate(
            f"iteration {iteration}",
            (iteration, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(8 if in_left_half else -8, -4 - 12 * number),
            textcoords="offset points",
            ha="left" if in_left_half else "right",
            va="top",
            fontsize="small",
            bbox={"color": "white", "alpha": 0.7, "pad": 0.5},
            zorder=6,
        )


def _label(axes: Any, quantity: str, averaged: int, prefix: str) -> None:
    name, unit = _NAMES.get(quantity, (quantity, ""))
    details = [unit] if unit else []
    details += [f"mean of {averaged} iterations"] if averaged > 1 else []
    axes.set_ylabel(f"{prefix}{name}" + (f"\n({', '.join(details)})" if details else ""))
    axes.grid(alpha=0.3)


def _legend(figure: Figure, panels: Iterable[Any]) -> None:
    """One for all panels, under them."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(1, _LEGEND_LETTERS // (max(map(len, handles)) + 8))
    legend = figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize="small",
    )
    for line in legend.get_lines():
        line.set_linewidth(_IN_LEGEND)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
