"""Line charts as inline SVG.

Places are shares of the chart's width and height, so that letters keep their size on any screen;
curves lie in an inner picture of 1000 x 1000 that is stretched. Colours are those of the style
sheet. The points are also there as JSON, for the script that tells the values under the pointer.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched

from megatron_dion_tools.report.pages import Html, element

Point = tuple[float, float]

_MOST_POINTS = 1200
"""Of a curve; a screen has not many more columns."""
_FEW_POINTS = 60
"""Of a curve, that are marked one by one where that is asked for."""
COLOURS = 7
"""That the style sheet has."""
_TICKS = 6
_LOGARITHMIC = 20.0
"""The ratio of largest to smallest from which an axis is logarithmic."""


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: for the legend.
        points: x and y, in the order of x; where y is not finite, the curve has a gap and the chart
            a mark.
        colour: number of one of the style sheet's colours.
        look: `line`, `faint` or `dots`.
    """

    name: str
    points: Sequence[Point]
    colour: int = 1
    look: str = "line"


@dataclass(frozen=True)
class Chart:
    """Curves over iterations.

    Attributes:
        title: what they are.
        unit: of their values.
        series: the curves.
        marks: iterations to mark by a line, where the run was resumed.
        level: a name and a value to compare with.
        from_zero: whether zero must be in sight, on an axis that is never logarithmic.
    """

    title: str
    unit: str
    series: Sequence[Series]
    marks: Sequence[float] = ()
    level: tuple[str, float] | None = None
    from_zero: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to shares of an axis, in percent."""

    low: float
    high: float
    is_logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, value = (self._measure(v) for v in (self.low, self.high, value))
        return 100 * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        powers = _powers(self.low, self.high) if self.is_logarithmic else []
        return powers if len(powers) > 1 else _round_values(self.low, self.high)

    def _measure(self, value: float) -> float:
        return math.log10(value) if self.is_logarithmic else value


def draw(chart: Chart) -> Html:
    """A figure with its title, the last values of its curves, and axes."""
    series = [one for one in chart.series if one.points]
    if not any(_finite(one.points) for one in series):
        what = "no finite value" if series else "no value"
        return element("p", f"{chart.title}: {what} was recorded.", class_="none")
    thin = [(one, thinned(one.points)) for one in series]
    x = x_scale(chart)
    y = y_scale(chart)
    return element(
        "figure",
        element(
            "figcaption",
            element("b", chart.title),
            f" {chart.unit}",
            element("span", class_="where"),
        ),
        element("div", *(_legend(one) for one in series), _level_name(chart), class_="legend"),
        element(
            "svg",
            *_axes(x, y),
            *_marks(chart, x),
            *_level(chart, y),
            _curves(thin, x, y),
            *(_dot(one, point, x, y) for one, points in thin for point in _dots(one, points)),
            element("line", y1="0", y2="100%", class_="cursor"),
            class_="plot",
            role="img",
            aria_label=_description(chart, series),
        ),
        class_="chart",
        data_domain=json.dumps([x.low, x.high]),
        data_series=json.dumps([_columns(points) for _, points in thin]),
    )


def number(value: float | None) -> str:
    """Four digits or so, as the script writes them too."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}".replace("inf", "∞")
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def x_scale(chart: Chart) -> Scale:
    """From the first to the last iteration."""
    every = [x for one in chart.series for x, _ in one.points]
    low, high = min(every), max(every)
    return Scale(low, high if high > low else low + 1)


def y_scale(chart: Chart) -> Scale:
    """Of all finite values, with a margin; logarithmic where they are of different magnitudes."""
    values = [y for one in chart.series for _, y in _finite(one.points)]
    values += [chart.level[1]] if chart.level else []
    low, high = min(values), max(values)
    if chart.from_zero:
        return Scale(min(low, 0.0), high * 1.05 or 1.0)
    if 0 < _LOGARITHMIC * low < high:
        return Scale(low / 1.2, high * 1.2, is_logarithmic=True)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - margin if low < 0 or low > margin else 0.0, high + margin)


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """No more points than can be told apart.

    Of neighbours stay the lowest, the highest, and one that is not finite.
    """
    if len(points) <= most:
        return list(points)
    found: list[Point] = []
    for some in batched(points, math.ceil(2 * len(points) / most)):
        finite = _finite(some)
        chosen = {min(finite, key=_y), max(finite, key=_y)} if finite else set[Point]()
        found += sorted({*chosen, *[point for point in some if point not in finite][:1]})
    return found


def _y(point: Point) -> float:
    return point[1]


def _finite(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _round_values(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{step * i:.12g}") for i in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten, and what is between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    times = (1, 2, 5) if decades < 2.5 else (1,)
    every = range(first, last + 1, round(decades / _TICKS) or 1)
    found = [float(f"{t}e{exponent}") for exponent in every for t in times]
    return [value for value in found if low <= value <= high]


def _axes(x: Scale, y: Scale) -> Iterator[Html]:
    for value in y.ticks():
        height = _percent(100 - y.place(value))
        yield element("line", x1="0", x2="100%", y1=height, y2=height, class_="grid")
        yield element("text", _tick(value), y=height, dx="-8", dy="4", class_="y")
    for value in (value for value in x.ticks() if value == int(value)):
        yield element("text", _tick(value), x=_percent(x.place(value)), y="100%", dy="19")
    yield element("line", x1="0", x2="100%", y1="100%", y2="100%", class_="axis")
    yield element("text", "iteration", x="100%", y="100%", dy="36", class_="name")


def _marks(chart: Chart, x: Scale) -> Iterator[Html]:
    for iteration in chart.marks:
        if x.low <= iteration <= x.high:
            place = _percent(x.place(iteration))
            yield element("line", x1=place, x2=place, y1="0", y2="100%", class_="mark")
            yield element("text", "resumed", x=place, y="0", dy="-4")


def _level(chart: Chart, y: Scale) -> Iterator[Html]:
    if chart.level:
        height = _percent(100 - y.place(chart.level[1]))
        yield element("line", x1="0", x2="100%", y1=height, y2=height, class_="level")


def _curves(thin: Sequence[tuple[Series, list[Point]]], x: Scale, y: Scale) -> Html:
    drawn = []
    for one, points in thin:
        broken = "".join(f"M{10 * x.place(at):.1f} 0v30" for at, v in points if not _shows(v, y))
        path = _path(points, x, y)
        drawn.append(element("path", d=path, class_=f"curve c{one.colour} {one.look}"))
        drawn += [element("path", d=broken, class_="curve broken")] if broken else []
    return element("svg", *drawn, viewBox="0 0 1000 1000", preserveAspectRatio="none")


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    words, pen = [], "M"
    for at, value in points:
        if not _shows(value, y):
            pen = "M"
            continue
        words.append(f"{pen}{10 * x.place(at):.1f} {1000 - 10 * y.place(value):.1f}")
        pen = "L"
    return "".join(words)


def _shows(value: float, y: Scale) -> bool:
    return math.isfinite(value) and (value > 0 or not y.is_logarithmic)


def _dots(one: Series, points: list[Point]) -> list[Point]:
    """Points to mark: those of which there are few, and a single one, which makes no line."""
    finite = _finite(points)
    wanted = one.look == "dots" and len(finite) <= _FEW_POINTS
    return finite if wanted or len(finite) == 1 else []


def _dot(one: Series, point: Point, x: Scale, y: Scale) -> Html:
    place = {"cx": _percent(x.place(point[0])), "cy": _percent(100 - y.place(point[1]))}
    return element("circle", r="2.5", **place, class_=f"c{one.colour}")


def _legend(one: Series) -> Html:
    last = number(one.points[-1][1])
    key = element("i", class_=f"c{one.colour} {one.look}")
    return element("span", key, f"{one.name} ", element("b", last, class_="value"))


def _level_name(chart: Chart) -> Html:
    if chart.level is None:
        return Html("")
    name, value = chart.level
    return element("span", element("i", class_="level"), f"{name} ", element("b", number(value)))


def _description(chart: Chart, series: Sequence[Series]) -> str:
    """For those who cannot see it."""
    ends = ", ".join(
        f"{one.name} from {number(one.points[0][1])} to {number(one.points[-1][1])}"
        for one in series
    )
    return f"{chart.title}: {ends}"


def _columns(points: Sequence[Point]) -> list[list[float | None]]:
    """JSON knows no NaN."""
    values = [float(f"{v:.5g}") if math.isfinite(v) else None for _, v in points]
    return [[at for at, _ in points], values]


def _percent(share: float) -> str:
    return f"{share:.2f}%"


def _tick(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"
