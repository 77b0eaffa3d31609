from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_dion_tools.convergence import page, pictures
from megatron_dion_tools.convergence.case import Case
from megatron_dion_tools.convergence.checks import Verdict
from megatron_dion_tools.convergence.curves import Curve
from megatron_dion_tools.convergence.evaluation import Outcome
from megatron_dion_tools.convergence.page import Section
from tests.pages import Page

ITERATIONS = range(1, 41)
CASE = Case(
    name="small",
    description="Dion & <AdamW> on the small model",
    flags=(),
    vocab_size=None,
    seeds=(1, 2, 3),
    short=True,
    runs={},
    golden=(),
    checks=(),
    controls=(),
)
REFERENCE = {i: 10 / i for i in ITERATIONS}
GOLDEN = {"torch": "2.9.0", "processor": "old <processor>", "revision": None}
HERE = {"torch": "2.9.0", "processor": "new & fast", "revision": "abc"}


def shifted(by: float, since: int = 1) -> Curve:
    return {i: value + (by if i >= since else 0) for i, value in REFERENCE.items()}


def verdict(name: str, curve: Curve, divergent: int | None = None, **changes: Any) -> Verdict:
    return replace(
        Verdict(
            check=f"{name}, seed 1 repeats dion, seed 1",
            quantity="lm_loss",
            passed=divergent is None,
            finding="equal" if divergent is None else f"differs from {divergent}",
            divergent=divergent,
            curves={f"{name}, seed 1": curve, "dion, seed 1": REFERENCE},
        ),
        **changes,
    )


BAND: dict[str, Any] = {"band": dict.fromkeys(ITERATIONS, 0.1), "window": 4}
PASSED = [
    verdict("restart", {i: REFERENCE[i] for i in range(20, 41)}),
    *(verdict(f"way {number}", shifted(0.01), **BAND) for number in range(9)),
    verdict("restart", REFERENCE, quantity="grad_norm"),
]
FAILED = verdict("tp2 <script>", shifted(0.5, since=30), divergent=30, **BAND)
NOTICED = verdict("no feedback", shifted(1e-7, since=12), divergent=12)
OVERLOOKED = verdict("nothing wrong", shifted(0))
FINE = Outcome(CASE, PASSED, [NOTICED])
BAD = Outcome(replace(CASE, name="large"), [*PASSED, FAILED], [NOTICED, OVERLOOKED])


@pytest.fixture(scope="module")
def content() -> str:
    flags = {"dion": "--optimizer dion --data-path '<here>'"}
    return page.render([Section(FINE, HERE, HERE, {}), Section(BAD, GOLDEN, HERE, flags)])


def test_page_says_what_failed(content: str) -> None:
    found = Page(content)
    assert "<h1>Convergence: 2 cases, 1 passed, 1 failed</h1>" in content
    failure = "tp2 <script>, seed 1 repeats dion, seed 1: lm_loss: differs from 30"
    assert ["small", "✓ passed", "11 of 11", "1 of 1", "–"] in found.rows
    assert ["large", "✗ FAILED", "11 of 12", "1 of 2", failure] in found.wrong
    checked = ["tp2 <script>, seed 1 repeats dion, seed 1", "lm_loss"]
    assert [*checked, "✗ FAILED", "30", "differs from 30"] in found.wrong


def test_page_says_which_mistakes_were_noticed(content: str) -> None:
    found = Page(content)
    check = "no feedback, seed 1 repeats dion, seed 1"
    noticed = ["no feedback", "✓ noticed", "12", check, "lm_loss", "differs from 12"]
    assert noticed in found.rows
    assert noticed not in found.wrong
    check = "nothing wrong, seed 1 repeats dion, seed 1"
    assert ["nothing wrong", "✗ NOT NOTICED", "–", check, "lm_loss", "equal"] in found.wrong


def test_page_shows_what_differs_between_environments(content: str) -> None:
    found = Page(content)
    assert ["processor", "old <processor>", "new & fast"] in found.wrong
    assert ["revision", "–", "abc"] in found.wrong
    assert ["torch", "2.9.0", "2.9.0"] in found.rows
    assert ["torch", "2.9.0", "2.9.0"] not in found.wrong
    assert content.count("need not repeat bit for bit") == 1
    assert content.count("must repeat bit for bit") == 1
    assert ["dion", "--optimizer dion --data-path '<here>'"] in found.rows


def test_page_needs_nothing_else_and_escapes_all(content: str) -> None:
    found = Page(content)
    sources = [str(attributes["src"]) for attributes in found.all("img")]
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,iVBORw0KGgo") for source in sources)
    assert all(attributes["alt"] for attributes in found.all("img"))
    assert not found.all("script") + found.all("link")
    assert {attributes["href"] for attributes in found.all("a")} == {"#small", "#large"}
    assert "url(" not in content
    assert "http" not in content
    assert "<p>Dion &amp; &lt;AdamW&gt; on the small model</p>" in content
    assert len({a["id"] for _, a in found.elements if "id" in a}) == 2


def test_case_without_controls_has_one_picture() -> None:
    name = 'a "quoted" name'
    outcome = Outcome(replace(CASE, name=name), PASSED[:1], [])
    content = page.render([Section(outcome, HERE, HERE, {})])
    assert [image["alt"] for image in Page(content).all("img")] == [f"curves of {name}"]
    assert "NOT NOTICED" not in content
    assert "1 case, 1 passed, 0 failed" in content


def test_text_has_failures_first() -> None:
    lines = page.text([FINE, BAD]).splitlines()
    assert lines[0] == (
        "FAILED  large: tp2 <script>, seed 1 repeats dion, seed 1: lm_loss: differs from 30"
    )
    assert lines[1].startswith("FAILED  large: mistake nothing wrong NOT NOTICED: ")
    assert all(line.startswith("passed  ") for line in lines[2:-1])
    assert any(line.startswith("passed  small: mistake no feedback noticed: ") for line in lines)
    assert len(lines) == len(PASSED) + 1 + len(PASSED) + 3 + 1
    assert lines[-1] == (
        "2 cases, 1 passed, 1 failed; 22 of 23 checks passed; 2 of 3 mistakes noticed"
    )


def test_picture_has_a_row_for_each_quantity_and_kind() -> None:
    panels = pictures.draw_case(BAD).axes
    # exact and band of the loss, exact of the gradient norm
    assert len(panels) == 6
    assert panels[0].get_ylabel() == "training loss\n(nats per token)"
    assert panels[3].get_ylabel() == (
        "difference of training loss\n(nats per token, mean of 4 iterations)"
    )
    assert panels[4].get_ylabel() == "gradient norm"


def lines_of(axes: Any) -> dict[str, list[Any]]:
    lines: dict[str, list[Any]] = {}
    for line in axes.get_lines():
        lines.setdefault(line.get_label(), []).append(line)
    return lines


def test_picture_draws_each_run_once_and_in_the_same_colour() -> None:
    _, _, left, right, *_ = pictures.draw_case(BAD).axes
    curves, differences = lines_of(left), lines_of(right)
    names = [*(f"way {number}, seed 1" for number in range(9)), "tp2 <script>, seed 1"]
    assert set(curves) == {*names, "dion, seed 1"}
    assert all(len(lines) == 1 for lines in curves.values())
    looks = set()
    for name in names:
        [curve], [difference] = curves[name], differences[name]
        assert curve.get_color() == difference.get_color()
        looks.add((curve.get_color(), str(curve.get_linestyle())))
    assert len(looks) == len(names)


def test_picture_marks_where_a_run_leaves_its_band() -> None:
    _, _, left, right, *_ = pictures.draw_case(BAD).axes
    # Means over fewer points than the window are left out of the curves, where they mislead.
    assert min(lines_of(left)["dion, seed 1"][0].get_xdata()) == 4
    [band] = right.collections
    assert set(np.array(band.get_paths()[0].vertices)[:, 1]) == {-0.1, 0.1}
    [difference] = lines_of(right)["tp2 <script>, seed 1"]
    assert difference.get_ydata()[29] == pytest.approx(0.5 / 4)
    [marker] = [line for line in right.get_lines() if line.get_marker() == "X"]
    assert marker.get_xdata() == [30]
    assert marker.get_ydata() == pytest.approx([0.5 / 4])
    assert [text.get_text() for text in right.texts] == ["iteration 30"]


def test_last_bits_are_visible_beside_large_differences() -> None:
    bits, much = verdict("bits", shifted(1e-7), 1), verdict("much", shifted(-1e-2), 1)
    axes = pictures.draw_comparison([bits, much]).axes[1]
    heights = [axes.transData.transform((1, y))[1] for y in (0, 1e-7, 1e-2)]
    assert heights[1] - heights[0] > 10
    assert heights[2] - heights[1] > 50
    [line] = lines_of(axes)["much, seed 1"]
    assert max(line.get_ydata()) == pytest.approx(1e-2)


def test_equal_runs_are_said_to_be_equal() -> None:
    axes = pictures.draw_comparison([verdict("same", REFERENCE)]).axes[1]
    assert [text.get_text() for text in axes.texts] == ["equal in all iterations"]


def test_run_that_explodes_does_not_hide_the_others() -> None:
    much = {i: REFERENCE[i] * (1e6 if i > 20 else 1) for i in ITERATIONS}
    left, right = pictures.draw_comparison([verdict("boom", much, 21, **BAND), FAILED]).axes
    assert left.get_ylim()[1] < 15
    assert right.get_ylim()[1] == pytest.approx(0.4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_run_without_finite_numbers_is_marked(value: float) -> None:
    broken = {i: value if i > 20 else REFERENCE[i] for i in ITERATIONS}
    figure = pictures.draw_comparison([verdict("nan", broken, 21, **BAND)])
    assert pictures.png(figure).startswith(b"\x89PNG")
    [marker] = [line for line in figure.axes[1].get_lines() if line.get_marker() == "X"]
    assert marker.get_ydata() == [figure.axes[1].get_ylim()[1]]


@pytest.mark.parametrize("curve", [{}, {1: 10.0}])
def test_run_that_stopped_is_marked(curve: Curve) -> None:
    figure = pictures.draw_comparison([verdict("short", curve, 2, **BAND)])
    assert pictures.png(figure).startswith(b"\x89PNG")
    assert [line.get_marker() for line in figure.axes[1].get_lines()].count("X") == 1
    assert [text.get_text() for text in figure.axes[1].texts] == ["iteration 2"]


def test_single_point_is_visible() -> None:
    axes = pictures.draw_comparison([verdict("one", {40: 0.25})]).axes
    assert lines_of(axes[0])["one, seed 1"][0].get_marker() == "o"
    assert lines_of(axes[0])["dion, seed 1"][0].get_marker() == ""
    assert lines_of(axes[1])["one, seed 1"][0].get_marker() == "o"


def test_seeds_are_subtracted_in_pairs() -> None:
    pairs = {
        f"{name}, seed {seed}": dict.fromkeys(ITERATIONS, seed + offset)
        for seed in (1, 2, 3)
        for name, offset in (("dion", -0.5), ("adam", 0.0))
    }
    left, right = pictures.draw_case(
        Outcome(CASE, [verdict("dion", REFERENCE, curves=pairs, window=2)], [])
    ).axes
    assert {len(lines) for lines in lines_of(left).values()} == {3}
    differences = lines_of(right)["dion"]
    assert [set(line.get_ydata()) for line in differences] == [{-0.5}] * 3


def test_controls_have_their_own_picture() -> None:
    assert pictures.draw_controls(Outcome(CASE, PASSED, [])) is None
    figure = pictures.draw_controls(FINE)
    assert figure is not None
    assert "no feedback, seed 1" in lines_of(figure.axes[0])


def test_page_of_a_comparison_has_verdicts_and_picture() -> None:
    content = page.render_comparison([*PASSED, FAILED])
    assert f"<h1>Comparison: 1 of {len(PASSED) + 1} differ</h1>" in content
    found = Page(content)
    assert [row[2] for row in found.wrong] == ["✗ FAILED"]
    assert len(found.all("img")) == 1
    assert "<h1>Comparison: alike</h1>" in page.render_comparison(PASSED)
