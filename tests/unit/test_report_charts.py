import math
import re
from html.parser import HTMLParser

import pytest

from megatron_dion_tools.report.charts import (
    Chart,
    Scale,
    Series,
    draw,
    number,
    thinned,
    y_scale,
)


class Drawing(HTMLParser):
    def __init__(self, chart: Chart) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(draw(chart))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def paths(self, of_class: str) -> list[str]:
        return [
            str(attributes["d"])
            for tag, attributes in self.found
            if tag == "path" and of_class in str(attributes["class"]).split()
        ]


def chart(*points: tuple[float, float], from_zero: bool = False) -> Chart:
    return Chart("Loss", "nats", [Series("training", points)], from_zero=from_zero)


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)]


def test_curve_lies_where_its_values_are() -> None:
    [path] = Drawing(chart((0, 0), (50, 10), (100, 20), from_zero=True)).paths("curve")
    assert places(path) == [
        (0, 1000),
        (500, pytest.approx(1000 - 1000 * 10 / 21, abs=0.1)),
        (1000, pytest.approx(1000 / 21, abs=0.1)),
    ]


def test_gap_and_mark_where_there_is_no_number() -> None:
    drawing = Drawing(chart((1, 4.0), (2, math.nan), (3, 3.0), (4, math.inf), (5, 2.0)))
    [path] = drawing.paths("c1")
    assert path.count("M") == 3
    [broken] = drawing.paths("broken")
    assert broken.count("M") == 2
    assert "nan" not in path + broken


def test_nothing_finite_is_said_and_not_drawn() -> None:
    assert "no finite value" in draw(chart((1, math.nan)))
    assert "no value" in draw(chart())


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-9])
def test_constant_and_single_values_have_an_axis(value: float) -> None:
    for points in ([(7.0, value)], [(1.0, value), (2.0, value)]):
        scale = y_scale(chart(*points))
        assert 0 <= scale.place(value) <= 100
        assert len(scale.ticks()) > 1
    assert any(tag == "circle" for tag, _ in Drawing(chart((7, value))).found)


def test_ticks_are_round_and_few() -> None:
    assert Scale(0, 1).ticks() == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Scale(1, 300).ticks() == [50, 100, 150, 200, 250, 300]
    for low, high in ((0.013, 0.017), (-4e9, 7e9), (1e-9, 3e-9), (0, 1)):
        ticks = Scale(low, high).ticks()
        assert 3 <= len(ticks) <= 8
        assert all(low <= tick <= high for tick in ticks)


def test_magnitudes_get_a_logarithmic_axis() -> None:
    scale = y_scale(chart((1, 1e-3), (2, 1e3)))
    assert scale.is_logarithmic
    assert scale.place(1.0) == pytest.approx(50)
    assert scale.ticks() == [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]
    narrow = y_scale(chart((1, 0.5), (2, 24)))
    assert narrow.ticks() == [0.5, 1, 2, 5, 10, 20]
    assert not y_scale(chart((1, 1e-3), (2, 1e3), from_zero=True)).is_logarithmic
    assert not y_scale(chart((1, 4.0), (2, 8.0))).is_logarithmic
    assert not y_scale(chart((1, 0.0), (2, 1e6))).is_logarithmic


def test_long_curves_keep_their_extremes_and_gaps() -> None:
    points = [(i, math.sin(i / 500)) for i in range(100_000)]
    points[31_415] = (31_415, 99.0)
    points[27_182] = (27_182, -99.0)
    points[16_180] = (16_180, math.nan)
    thin = thinned(points)
    assert len(thin) < 2000
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    assert {points[31_415], points[27_182]} <= set(thin)
    assert any(math.isnan(y) for _, y in thin)
    assert thinned(points[:100]) == points[:100]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "NaN"),
        (math.inf, "+∞"),
        (12345.6, "12,346"),
        (0.00012345, "0.0001234"),
        (4.0, "4"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text
