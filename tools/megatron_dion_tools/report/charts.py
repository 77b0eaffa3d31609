"""Line charts by matplotlib, as pictures that stand in a page."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]

_STYLE: dict[Any, Any] = {
    "axes.formatter.limits": (-4, 5),
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.fonttype": "none",  # letters stay text
    "text.parse_math": False,
}
_LOGARITHMIC = 20.0
"""The ratio of the largest to the smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: For the legend, which has the last value too.
        points: x and y, in the order of x; where y is not finite, the curve has a gap.
        is_faint: Whether the curve is pale, behind its mean.
        has_dots: Whether its points are marked, because they are few.
    """

    name: str
    points: Sequence[Point]
    is_faint: bool = False
    has_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over iterations.

    Attributes:
        title: What the curves show.
        unit: Of their values.
        curves: The curves; those without points are left out.
        from_zero: Whether the axis of values begins at zero.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    from_zero: bool = False

    def picture(self, marked: Sequence[int]) -> str | None:
        """Return the address of an SVG that has its content in it; None without a finite value.

        Args:
            marked: Iterations that get a vertical line.
        """
        svg = self.svg(marked)
        return svg and f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"

    def svg(self, marked: Sequence[int]) -> str | None:
        """Return the picture as SVG; None without a finite value."""
        values = [y for curve in self.curves for _, y in curve.points if math.isfinite(y)]
        if not values:
            return None
        with matplotlib.rc_context(_STYLE | {"svg.hashsalt": self.title}):
            figure = Figure(figsize=(5, 3.4), layout="constrained")
            axes = figure.add_subplot(title=self.title, xlabel="iteration", ylabel=self.unit)
            for curve in (curve for curve in self.curves if curve.points):
                axes.plot(
                    *zip(*curve.points, strict=True),
                    label=f"{curve.name} {short(curve.points[-1][1])}",
                    alpha=0.4 if curve.is_faint else 1,
                    marker="o" if curve.has_dots or len(curve.points) == 1 else "",
                    markersize=3.5,
                )
            for number, iteration in enumerate(marked):
                label = "_" if number else "resumed"  # matplotlib leaves out what begins with _
                axes.axvline(iteration, color="grey", linestyle=":", label=label)
            if self.from_zero:
                axes.set_ylim(bottom=0)
            elif 0 < _LOGARITHMIC * min(values) < max(values):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            axes.legend(fontsize="small")
            file = io.StringIO()
            figure.savefig(file, format="svg")
        return file.getvalue()


def short(value: str | float | None) -> str:
    """Return a number with four digits or so, a dash for None, and a text as it is."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return value if isinstance(value, str) else f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
