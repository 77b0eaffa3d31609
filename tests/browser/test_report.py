"""The report in a browser: on a laptop in light colours, and on a phone in dark ones."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_dion_tools.report.folder import read_folder
from megatron_dion_tools.report.page import render
from tests.browser import chromium
from tests.run_folders import loss_at, write_run

pytestmark = pytest.mark.skipif(
    chromium.find() is None,
    reason=f"none of {', '.join(chromium.NAMES)} is on PATH: install your distribution's chromium,"
    " or name a browser with CHROMIUM=path",
)

LAPTOP, PHONE = 1280, 390
# What is measured in the page: widths before and after all is unfolded, tables that are cut then,
# colours, and the place of each letter of a chart, the first chart's first.
MEASURE = """(() => {
  const all = (name) => [...document.querySelectorAll(name)].filter((e) => e.checkVisibility());
  const colour = (style) => style.match(/\\d+/g).map(Number);
  const measured = {
    width: document.documentElement.scrollWidth,
    page: colour(getComputedStyle(document.body).backgroundColor),
    curves: all("figure i").map((key) => colour(getComputedStyle(key).borderTopColor)),
    letters: all("svg text").map((text) => {
      const {left, right, top, bottom} = text.getBoundingClientRect();
      return {text: text.textContent, left, right, top, bottom};
    }),
  };
  all("details").forEach((details) => { details.open = true; });
  measured.unfolded = document.documentElement.scrollWidth;
  measured.cut = all(".scrolling").filter((e) => e.scrollWidth > e.clientWidth).length;
  return measured;
})()"""


class Shown(NamedTuple):
    """A report on a screen."""

    width: int
    pixels: NDArray[np.int64]
    measured: dict[str, Any]


@pytest.fixture(scope="module", params=[(LAPTOP, "light"), (PHONE, "dark")], ids=str)
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    width, scheme = request.param
    folder = tmp_path_factory.mktemp("report")
    page = render(read_folder(write_run(folder, reason="linear layer")))
    return Shown(width, *chromium.show(page, folder, width, 2000, scheme, MEASURE))


def test_scheme_of_the_screen_is_followed(shown: Shown) -> None:
    page = shown.pixels[3, 3]
    assert page.tolist() == shown.measured["page"]
    assert page.min() > 240 if shown.width == LAPTOP else page.max() < 40


def test_losses_are_drawn_where_the_axes_say(shown: Shown) -> None:
    """Labels of the axes give the place of a value; there the curve has its colour."""
    letters = shown.measured["letters"]
    first_chart = letters[: 1 + [one["text"] for one in letters].index("8")]
    centres = {
        float(one["text"]): ((one["left"] + one["right"]) / 2, (one["top"] + one["bottom"]) / 2)
        for one in first_chart
        if one["text"] != "iteration"
    }
    # Labels from 10 on are iterations, and from 2 to 8 losses.
    across, down = (
        np.polyfit(labels, [centres[label][axis] for label in labels], 1)
        for axis, labels in (
            (0, [label for label in centres if label >= 10]),
            (1, [label for label in centres if 2 <= label <= 8]),
        )
    )
    _, mean, validation, *_ = shown.measured["curves"]
    for colour, above, iterations in ((mean, 0, (20, 80, 150)), (validation, 0.5, (60, 130, 160))):
        for iteration in iterations:
            x = round(np.polyval(across, iteration))
            y = round(np.polyval(down, loss_at(iteration) + above))
            differences = np.abs(shown.pixels[:, x - 1 : x + 2] - colour).sum(axis=-1)
            assert differences[y - 3 : y + 4].min() < 40, iteration
            assert differences[y + 30 : y + 40].min() > 120, iteration


def test_page_fits_the_screen(shown: Shown) -> None:
    assert shown.measured["width"] == shown.measured["unfolded"] == shown.width
    assert shown.width == PHONE or shown.measured["cut"] == 0
    for letters in shown.measured["letters"]:
        assert letters["right"] <= shown.width
        assert letters["bottom"] - letters["top"] > 10
