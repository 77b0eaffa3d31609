"""The report in a browser: on a laptop and a phone, light and dark, with scripts and without."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_dion_tools.report.charts import COLOURS, Chart, Scale, Series, x_scale, y_scale
from megatron_dion_tools.report.folder import read_folder
from megatron_dion_tools.report.page import render
from tests.browser import picture
from tests.browser.chromium import Box, Tab
from tests.run_folders import (
    ITERATIONS,
    LAYERS,
    MATRICES,
    RESUMED_AFTER,
    loss_at,
    write_run,
)

LAPTOP, PHONE = 1280, 390
WIDTH = "document.documentElement.scrollWidth"
LOSS = "document.querySelector('.chart')"
# How far from the paper's colour, or from a curve's, is far, of 255 for each of three colours.
NEAR, FAR = 40, 120


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "run")
    (run_dir / "report.html").write_text(render(read_folder(run_dir)))
    return run_dir / "report.html"


def colour_of(tab: Tab, selector: str, name: str) -> NDArray[np.int64]:
    text = tab.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}")
    return np.array([int(part) for part in text.removeprefix("rgb(").rstrip(")").split(",")])


def distance(pixels: NDArray[np.uint8], colour: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum over the three colours."""
    result: NDArray[np.int64] = np.abs(pixels.astype(np.int64) - colour).sum(axis=-1)
    return result


def loss_scales() -> tuple[Scale, Scale]:
    """Of the chart of losses, by the values that are drawn there."""
    losses = [(i, loss_at(i)) for i in range(1, ITERATIONS + 1)]
    validation = [(i, loss_at(i) + 0.5) for i in (50, 100, 150, 200)]
    chart = Chart("", "", [Series("", losses), Series("", validation)], level=("", 6.5))
    return x_scale(chart), y_scale(chart)


def around(pixels: NDArray[np.uint8], x: float, y: float) -> NDArray[np.uint8]:
    """Seven by seven pixels."""
    column, line = round(x), round(y)
    return pixels[line - 3 : line + 4, column - 3 : column + 4]


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_are_where_their_values_are(tab: Tab, page: Path, width: int, scheme: str) -> None:
    tab.open(page, width, scheme)
    assert tab.complaints == []
    assert tab.requested == [page.resolve().as_uri()]
    paper = colour_of(tab, "body", "backgroundColor")
    assert paper.sum() > 3 * 240 if scheme == "light" else paper.sum() < 3 * 40
    assert (tab.pixels(Box(0, 0, 9, 9)) == paper).all()
    pixels = tab.pixels(plot := tab.box(f"{LOSS}.querySelector('.plot')"))
    x, y = loss_scales()
    curves: Sequence[tuple[str, str, list[tuple[int, float]]]] = [
        (".curve.c1.line", "stroke", [(i, loss_at(i)) for i in (20, 80, 110, 150)]),
        (".curve.c2", "stroke", [(i, loss_at(i) + 0.5) for i in (60, 130, 160)]),
    ]
    for selector, name, points in curves:
        colour = colour_of(tab, selector, name)
        for iteration, value in points:
            across = plot.width * x.place(iteration) / 100
            down = plot.height * (1 - y.place(value) / 100)
            assert distance(around(pixels, across, down), colour).min() < NEAR
            assert distance(around(pixels, across, down + 40), colour).min() > FAR


def contrast(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """As WCAG 2.2 defines it, from 1 to 21."""

    def luminance(colour: NDArray[np.int64]) -> float:
        share = colour / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_the_page(tab: Tab, page: Path, scheme: str) -> None:
    """Text and curves have the contrast that WCAG asks for: 4.5 and 3."""
    tab.open(page, LAPTOP, scheme)
    paper, text = (colour_of(tab, "body", name) for name in ("backgroundColor", "color"))
    assert contrast(paper, text) > 7
    assert contrast(colour_of(tab, ".note", "backgroundColor"), text) > 4.5
    shade = colour_of(tab, ".facts div", "backgroundColor")
    assert contrast(shade, colour_of(tab, "dt", "color")) > 4.5
    assert contrast(colour_of(tab, "figcaption", "color"), paper) > 4.5
    for number in range(1, COLOURS + 1):
        assert contrast(colour_of(tab, f".curve.c{number}", "stroke"), paper) > 3, number
    last = tab.box("[...document.querySelectorAll('[open] .heat td')].at(-1)")
    strongest = tab.pixels(Box(last.left + 2, last.top + 2, 1, 1))[0, 0]
    assert contrast(strongest.astype(np.int64), text) > 4.5


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_nothing_is_wider_than_the_screen(tab: Tab, page: Path, width: int) -> None:
    tab.open(page, width)
    assert tab.evaluate(WIDTH) == width
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.evaluate(WIDTH) == width
    texts = "[...document.querySelectorAll('.plot text')]"
    heights = tab.evaluate(f"{texts}.map((t) => t.getBoundingClientRect().height)")
    assert min(heights) > 10  # pixels: a chart's letters do not shrink with the chart
    ends = tab.evaluate(f"{texts}.map((t) => t.getBoundingClientRect().right)")
    assert max(ends) <= width


def test_no_table_is_cut_on_a_laptop(tab: Tab, page: Path) -> None:
    tab.open(page, LAPTOP)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    cut = (
        "[...document.querySelectorAll('.scrolling')].filter((s) => s.scrollWidth > s.clientWidth)"
    )
    assert tab.evaluate(f"{cut}.length") == 0
    lines = """[...document.querySelectorAll('.heat thead th')].flatMap((t) => [...t.childNodes])
        .filter((part) => part.nodeType === Node.TEXT_NODE).map((part) => {
            const range = document.createRange();
            range.selectNode(part);
            return range.getClientRects().length;
        })"""
    assert set(tab.evaluate(lines)) == {1}  # a heading breaks between the parts of a name only


def test_heat_map_is_shaded(tab: Tab, page: Path) -> None:
    tab.open(page, LAPTOP)
    shades = tab.evaluate(
        "[...document.querySelectorAll('.heat td')].map((c) => getComputedStyle(c).backgroundColor)"
    )
    first = shades[: LAYERS * len(MATRICES)]
    assert len(set(first)) == len(first)
    last = tab.box("[...document.querySelectorAll('[open] .heat td')].at(-1)")
    corner = tab.pixels(Box(last.left + 2, last.top + 2, 4, 4))[2, 2]
    heat = tab.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--heat')")
    assert f"#{bytes(corner).hex()}" == heat


def test_rows_are_searched(tab: Tab, page: Path) -> None:
    tab.open(page, LAPTOP)
    table = "#routing .searched"
    assert not tab.evaluate(f"document.querySelector('{table}').open")
    tab.evaluate(f"document.querySelector('{table}').open = true")
    found = f"document.querySelector('{table} .search span').textContent"
    whole = LAYERS * (len(MATRICES) + 1) + 1
    assert tab.evaluate(found) == f"{whole} of {whole}"
    tab.evaluate(f"document.querySelector('{table} input').focus()")
    tab.call("Input.insertText", text="DION layers.2 qkv")
    assert tab.evaluate(found) == f"3 of {whole}"
    shown = f"[...document.querySelectorAll('{table} tbody tr')].filter((r) => r.offsetHeight)"
    names = tab.evaluate(f"{shown}.map((row) => row.cells[0].textContent)")
    start = "decoder.layers.2.self_attention.linear_qkv.weight"
    assert names == [f"{start}[{part}]" for part in ("query", "key", "value")]
    assert tab.complaints == []


def test_values_under_the_pointer_are_told(tab: Tab, page: Path) -> None:
    tab.open(page, LAPTOP)
    values = f"[...{LOSS}.querySelectorAll('.value')].map((value) => value.textContent)"
    last = tab.evaluate(values)
    plot = tab.box(f"{LOSS}.querySelector('.plot')")
    share = (RESUMED_AFTER - 1) / (ITERATIONS - 1)
    tab.move_pointer(plot.left + plot.width * share, plot.top + plot.height / 2)
    assert tab.evaluate(f"{LOSS}.querySelector('.where').textContent") == (
        f"iteration {RESUMED_AFTER}"
    )
    loss, mean, validation = tab.evaluate(values)
    assert loss == f"{loss_at(RESUMED_AFTER):.4g}"
    assert float(mean) == pytest.approx(float(loss), abs=0.02)
    assert validation == f"{loss_at(100) + 0.5:.4g}"
    tab.move_pointer(5, 5)
    assert tab.evaluate(values) == last
    assert tab.complaints == []


def test_without_scripts_all_is_there_but_the_search(tab: Tab, page: Path) -> None:
    tab.open(page, LAPTOP)
    top = Box(0, 0, LAPTOP, 2000)
    with_scripts = tab.pixels(top)
    tab.open(page, LAPTOP, script=False)
    assert (tab.pixels(top) == with_scripts).all()
    nodes = tab.call("DOM.getDocument", depth=-1)["root"]["nodeId"]

    def count(selector: str) -> int:
        found = tab.call("DOM.querySelectorAll", nodeId=nodes, selector=selector)
        return len(found["nodeIds"])

    assert count("#routing .searched tbody tr") == LAYERS * (len(MATRICES) + 1) + 1
    assert count("input") == 0


def test_a_script_that_fails_is_noticed(tab: Tab, page: Path, tmp_path: Path) -> None:
    """The tests above would not be worth much otherwise."""
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.read_text().replace("document.querySelectorAll", "document.querySelectorAl")
    )
    tab.open(broken, LAPTOP)
    assert any("querySelectorAl is not a function" in complaint for complaint in tab.complaints)


@pytest.mark.usefixtures("tab")
def test_picture_of_the_documentation(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn by its command, with a browser of its own."""
    words = ["tests.browser.picture", str(page.parent), "--output", str(tmp_path / "report.png")]
    monkeypatch.setattr("sys.argv", words)
    picture.main()
    laptop, phone = (round(width * picture.SCALE) for width in picture.WIDTHS.values())
    drawn, kept = (
        matplotlib.image.imread(path) for path in (tmp_path / "report.png", picture.PICTURE)
    )
    assert drawn.shape[:2] == kept.shape[:2] == (847, laptop + phone)
    for image in (drawn, kept):
        assert image[:9, :9, :3].min() > 0.9
        assert image[:9, -9:, :3].max() < 0.2
