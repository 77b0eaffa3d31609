"""Line charts by matplotlib, as SVG that stands in a page and takes its colours from the page."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

Point = tuple[float, float]

CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0528a", "#2f8fc6", "#a87400", "#5b5b66")
_FAINT, _LINE = "#666666", "#dddddd"
_VARIABLES = {_FAINT: "--faint", _LINE: "--line"} | {
    colour: f"--c{number}" for number, colour in enumerate(CURVE_COLOURS, start=1)
}
"""The variables of the page's style sheet that replace the colours that matplotlib draws with."""

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _FAINT,
    "axes.formatter.limits": (-4, 5),
    "axes.grid": True,
    "axes.labelcolor": _FAINT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 12,
    "grid.color": _LINE,
    "path.simplify_threshold": 0.5,
    "svg.fonttype": "none",  # letters stay text
    "text.parse_math": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
}
_LOGARITHMIC = 20.0
"""The ratio of the largest to the smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: for the legend.
        points: x and y, in the order of x; where y is not finite, the curve has a gap.
        colour: index into `CURVE_COLOURS`, and beyond the last one again from the first, dashed.
        is_faint: whether the curve is pale, behind its mean.
        has_dots: whether its points are marked, because they are few.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    is_faint: bool = False
    has_dots: bool = False

    @property
    def is_dashed(self) -> bool:
        return self.colour >= len(CURVE_COLOURS)

    @property
    def variable(self) -> str:
        """The variable of the page's style sheet that has its colour."""
        return _VARIABLES[CURVE_COLOURS[self.colour % len(CURVE_COLOURS)]]


@dataclass
class Chart:
    """Curves over iterations.

    Attributes:
        title: what the curves show.
        unit: of their values.
        curves: the curves; those without points are left out.
        from_zero: whether the axis of values begins at zero.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    from_zero: bool = False

    def __post_init__(self) -> None:
        self.curves = [curve for curve in self.curves if curve.points]

    @property
    def values(self) -> list[float]:
        """All values that can be drawn."""
        return [y for curve in self.curves for _, y in curve.points if math.isfinite(y)]

    def svg(self, marked: Sequence[int], width: int = 400, height: int = 250) -> Markup:
        """The picture of one finite value or more.

        Args:
            marked: iterations that get a vertical line.
            width: in pixels of CSS, where the page does not scale the picture.
            height: the same.
        """
        with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"{self.title} {width}"}):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            self._draw(figure.add_subplot(), marked)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True)
        return _for_page(file.getvalue())

    def _draw(self, axes: Axes, marked: Sequence[int]) -> None:
        for curve in self.curves:
            axes.plot(
                *zip(*curve.points, strict=True),
                color=CURVE_COLOURS[curve.colour % len(CURVE_COLOURS)],
                linestyle="--" if curve.is_dashed else "-",
                linewidth=1 if curve.is_faint else 1.8,
                alpha=0.4 if curve.is_faint else 1,
                marker="o" if curve.has_dots or len(curve.points) == 1 else "",
                markersize=3.5,
            )
        for iteration in marked:
            axes.axvline(iteration, color=_FAINT, linestyle=":", linewidth=1)
        if self.from_zero:
            axes.set_ylim(bottom=0)
        elif 0 < _LOGARITHMIC * min(self.values) < max(self.values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("iteration")


def _for_page(svg: str) -> Markup:
    """An SVG file as an element of a page, with the fonts and colours of the page."""
    for pattern, replacement in (
        (r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", ""),
        (r'(?<=<svg)(.*?) (?:width|height)="[^"]*"', r"\1"),
        (r'(?<=<svg)(.*?) (?:width|height)="[^"]*"', r'\1 aria-hidden="true"'),
        (r'(?<=<g) id="[^"]*"', ""),
        (r" font-family: [^;]*;", ""),
        (r"\s+", " "),
    ):
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)
