"""Line charts by matplotlib, as pictures that stand in a page or in a file."""

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
_LONGEST_NAME = 24


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: For the legend; without a name the curve is pale, behind its mean.
        points: y by x, in the order of x; where y is not finite, the curve has a gap.
        color: The number of its colour; curves of one run share it.
        marker: Matplotlib's name of the marks at its points; such a curve is dashed.
        marked: Places on the x axis that get a vertical line.
    """

    name: str
    points: Mapping[Any, float]
    color: int
    marker: str = ""
    marked: Sequence[Any] = ()


@dataclass(frozen=True)
class Chart:
    """Curves over iterations, or over another x.

    Attributes:
        title: What the curves show.
        unit: Of their values.
        curves: The curves; those without points are left out.
        x: The name of the x axis.
        from_zero: Whether the axis of values begins at zero.
        top: Where the axis of values ends, if the largest value does not say it.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    x: str = "iteration"
    from_zero: bool = False
    top: float | None = None

    def picture(self) -> str:
        """Return the address of an SVG that has its content in it."""
        svg = draw([self], format="svg", transparent=True)
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    def plot(self, axes: Axes) -> None:
        """Draw the curves."""
        axes.set(title=self.title, xlabel=self.x, ylabel=self.unit)
        values = [y for curve in self.curves for y in curve.points.values() if math.isfinite(y)]
        if not values:
            axes.set_title(f"{self.title}: no finite value was recorded")
            return
        for curve in (curve for curve in self.curves if curve.points):
            name = curve.name or "_"  # which the legend leaves out
            axes.plot(
                list(curve.points),
                list(curve.points.values()),
                label=name if len(name) <= _LONGEST_NAME else f"…{name[-_LONGEST_NAME:]}",
                color=f"C{curve.color}",
                alpha=1 if curve.name else 0.25,
                linestyle="--" if curve.marker else "-",
                marker=curve.marker or ("o" if len(curve.points) == 1 else ""),
                markersize=3.5,
            )
            for x in curve.marked:
                axes.axvline(x, color=f"C{curve.color}", linestyle=":", label="_")
        if self.from_zero:
            axes.set_ylim(0, 1.05 * max(values) or None)
        elif self.top is not None:
            axes.set_ylim(min(values) - 0.04 * (self.top - min(values)), self.top)
        elif 0 < _LOGARITHMIC * min(values) < max(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.legend(fontsize="small", loc="best")


def draw(charts: Sequence[Chart], caption: str = "", **options: Any) -> bytes:
    """Return a file of charts side by side, above a caption; the options are matplotlib's."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": charts[0].title}):
        figure = Figure(figsize=(4.2 * len(charts), 3), layout="constrained")
        for number, chart in enumerate(charts, start=1):
            chart.plot(figure.add_subplot(1, len(charts), number))
        lines = (textwrap.fill(line, 64 * len(charts)) for line in caption.splitlines())
        figure.text(0.01, -0.02, "\n".join(lines), va="top")
        file = io.BytesIO()
        figure.savefig(file, **options)
    return file.getvalue()


def short(value: str | float | None) -> str:
    """Return a number with four digits or so, a dash for None, and a text as it is."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return value if isinstance(value, str) else f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
