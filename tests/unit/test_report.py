"""What the report says of all kinds of runs."""

import base64
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import pytest
from bs4 import BeautifulSoup

from megatron_dion.optimizer import diagnostics
from megatron_dion.optimizer.diagnostics import MatrixDiagnostics, Snapshot
from megatron_dion_tools.cli import call
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.report.charts import Chart, Curve
from megatron_dion_tools.report.folder import read_folder
from megatron_dion_tools.report.page import Report
from tests import run_folders as run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
REASON = "<script>linear</script> layer"


class Page:
    """A page about runs."""

    def __init__(self, *folders: Path) -> None:
        self.report = Report([read_folder(folder) for folder in folders])
        self.html = self.report.page()
        self.soup = BeautifulSoup(self.html, "html.parser")
        self.said = "\n".join(self.texts("p"))
        self.tables = [
            {
                row.td.text: [cell.text for cell in row.find_all("td")[1:]]
                for row in table.find_all("tr")
                if row.td
            }
            for table in self.soup.find_all("table")
        ]
        self.facts = self.tables[0]

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.soup.select(selector)]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(run.write_run(tmp_path_factory.mktemp("runs") / "large & <new>", reason=REASON))


def test_head_tells_what_became_of_the_run(complete: Page) -> None:
    assert complete.texts("h1") == ["Run large & <new>"]
    losses = [run.loss_at(i) for i in range(1, run.ITERATIONS + 1)]
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10  # means of a twentieth
    answer = f"Finished: iteration {run.ITERATIONS} of {run.ITERATIONS}. The training loss fell"
    assert f"{answer} from {first:.3f} to {last:.3f}, in the last tenth by 0.38." in complete.said
    assert f"The run was resumed after iteration {run.RESUMED_AFTER}." in complete.said
    per_layer = sum(rows * columns for rows, columns in run.MATRICES.values())
    share = run.LAYERS * per_layer / (run.LAYERS * (per_layer + 64) + 512 * 64)
    assert complete.facts == {
        "optimizer": ["dion, rank fraction 0.25"],
        "updated by Dion": [f"{share:.1%} of the elements"],
        "training loss": [f"{last:.3f}"],
        "validation loss": ["4.500"],
        "tokens": ["409,600"],
        # Iterations that set things up took 9 s, all others half a second.
        "tokens/s, median": ["4096"],
        "time, in optimizer": [f"0:01:57, {10 / 117:.1%}"],
        "sent per step": ["0.001 MB"],
        "ranks": ["4: TP2 × DP2"],
    }


def test_page_needs_nothing_else(complete: Page) -> None:
    assert complete.html.startswith("<!doctype html>")
    assert not complete.soup.find_all(["link", "script", "iframe", "a"])
    assert len(complete.soup.find_all("img")) == 9
    for image in complete.soup.find_all("img"):
        assert str(image["src"]).startswith("data:image/svg+xml;base64,")


def words(chart: Chart) -> list[str]:
    svg = base64.b64decode(chart.picture().partition(",")[2]).decode()
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_tables_have_kinds_and_all_matrices(complete: Page) -> None:
    rows = [[name, *cells] for table in complete.tables for name, cells in table.items()]
    kind = "decoder.layers.*.self_attention.linear_qkv.weight[key]"
    assert [kind, "32 × 64", "8", "dion", REASON, "3", "6,144"] in rows
    norm = ["decoder.layers.*.input_layernorm.weight", "64", "–", "adam", "1-D", "3", "192"]
    assert norm in rows
    one = "decoder.layers.2.mlp.linear_fc2.weight"
    assert [one, "64 × 160", "16", "0.72", "4", "0.5"] in rows
    start = [str(run.RESUMED_AFTER), "245,760", "2026-11-24 20:55:02 UTC", "4: TP2 × DP2"]
    assert start in rows
    assert ["git revision", "not in a git repository"] in rows
    assert ["lr", "0.008", "none"] in rows
    assert "seed" not in {name for name, *_ in rows}  # it has its default
    assert "pretrain_gpt.py --optimizer dion --data-path 'a b'" in complete.texts("code")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A run with AdamW, one that is as good in half of its time, and one that diverges."""
    folder, count = tmp_path_factory.mktemp("runs"), run.ITERATIONS
    halves = [min(2 * i, count) for i in range(1, count + 1)]
    slow = [run.train_record(i, run.loss_at(i)) for i in range(1, count + 1)]
    fast = [run.train_record(i, run.loss_at(half)) for i, half in enumerate(halves, start=1)]
    wild = [run.train_record(i, run.loss_at(i) if i < 150 else math.nan) for i in range(1, 181)]
    for loss, records in ((4.5, slow), (4.25, fast)):
        sets = {"lm_loss": loss, "lm_loss-code": loss / 2}
        records.append({"kind": "validation", "iteration": count, **sets})
    return Page(
        run.write_run(folder / "adamw", slow, optimizer="adam", run_dir="runs/adamw"),
        run.write_run(folder / "fast", fast, run_dir="runs/fast"),
        run.write_run(folder / "wild", wild, lr=0.5, run_dir="runs/wild"),
    )


def test_runs_are_compared_with_the_first(compared: Page) -> None:
    assert compared.texts("h1") == ["3 runs, compared with adamw"]
    adamw, fast, wild = compared.texts(".answer")
    assert "adamw’s" not in adamw
    # The mean over ten iterations of adamw's end is reached a little after the half.
    reached = re.search(r"It reaches adamw’s last training loss in (\d+)% of", fast)
    assert reached
    assert int(reached[1]) in range(50, 53)
    assert (
        "; its validation loss in iteration 200 is 0.25 lower; its validation loss-code in" in fast
    )
    assert "Unfinished, running or stopped: iteration 180 of 200. Diverged: the training" in wild
    assert "not finite after iteration 149. It does not reach adamw’s last training loss." in wild
    assert compared.facts["validation loss-code"] == ["2.250", "2.125", "–"]
    differing = {"optimizer": ["adam", "dion", "dion"], "lr": ["0.008", "0.008", "0.5"]}
    assert compared.tables[1] == differing
    assert compared.texts("summary h2") == compared.report.names == ["adamw", "fast", "wild"]


def test_charts_show_all_runs_by_iteration_and_by_time(compared: Page, complete: Page) -> None:
    legend = ["adamw", "fast", "wild"]
    by_iteration, by_time, *others = compared.report.charts
    for chart in (by_iteration, by_time):
        assert {*legend, "validation", "validation-code"} <= {*words(chart)}
    for chart in others:
        assert {*legend} <= {*words(chart)}, chart.title
    [fast] = [curve for curve in by_time.curves if curve.name == "fast"]
    assert "seconds of iterations" in words(by_time)
    assert max(fast.points) == 2 * 9 + 198 * 0.5  # two starts
    assert fast.marked == [9 + 119 * 0.5]
    # The first losses, and those of a run that diverges, would hide how the last ones differ.
    assert 7 < (by_iteration.top or 0) < 8
    [captured] = [
        base64.b64decode(str(image["src"]).partition(",")[2]).decode()
        for image in complete.soup.find_all("img", alt="Captured share")
    ]
    assert ">mlp.linear_fc1[gate]<" in captured


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (390, "light"), (1280, "dark")])
def test_page_fits_screens(compared: Page, tmp_path: Path, width: int, scheme: str) -> None:
    """In Chromium, in a frame, since a window cannot be as narrow as a phone."""
    script = """const page = document.querySelector("iframe").contentDocument;
        const drawn = [...page.images].every((image) => image.naturalWidth > 0);
        const color = getComputedStyle(page.body).backgroundColor;
        document.body.textContent = [page.documentElement.scrollWidth, drawn, color].join(" ");"""
    frame = f'<iframe srcdoc="{html.escape(compared.html)}" width={width}></iframe>'
    path = tmp_path / "frame.html"
    path.write_text(f"{frame}<script>onload = () => {{ {script} }}</script>")
    flags = f"--headless=new --no-sandbox --hide-scrollbars --user-data-dir={tmp_path} --dump-dom"
    dark = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    command = [str(CHROMIUM), *flags.split(), dark, path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    color = {"dark": "rgb(23, 23, 26)", "light": "rgb(255, 255, 255)"}[scheme]
    assert f"{width} true {color}" in shown


def test_what_a_run_has_not_recorded_is_said(tmp_path: Path) -> None:
    losses = [math.nan if 30 <= i < 36 else run.loss_at(i) for i in range(1, 101)]
    records = [run.train_record(i, loss) for i, loss in enumerate(losses, start=1)]
    records[59] |= {"lm_loss": None, "skipped": True}
    page = Page(run.write_run(tmp_path, records, reason=REASON))
    assert "Unfinished, running or stopped: iteration 100 of 200." in page.said
    assert "The training loss is not finite in iteration 30 and 5 more." in page.said
    assert "The step was skipped in iteration 60" in page.said
    assert "was resumed" not in page.said
    assert "with --dion-log-interval N" in page.said
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-7])
    assert "The last line of metrics.jsonl is cut off" in Page(tmp_path).said

    page = Page(run.write_run(tmp_path, [run.train_record(7, math.nan)]))
    assert "Curves begin at iteration 7" in page.said
    assert "It has no finite training loss." in page.said
    assert "Loss: no finite value was recorded" in words(page.report.charts[0])

    risen = [run.train_record(i, 4 + abs(i - 60) / 20) for i in range(1, 101)]
    page = Page(run.write_run(tmp_path, risen))
    assert "rose again, from 4.060 in iteration 62 to 5.900." in page.said

    for name in ("metrics.jsonl", "starts.jsonl", "routing.tsv"):
        (tmp_path / name).unlink()
    page = Page(tmp_path)
    assert "No iteration was recorded" in page.said
    assert page.facts == {"optimizer": ["dion, rank fraction 0.25"]}


def test_axes_are_logarithmic_where_values_differ_in_magnitude() -> None:
    def labels(*values: float, from_zero: bool = False) -> list[str]:
        curve = Curve("x", dict(enumerate(values)), 0)
        return words(Chart("", "", [curve], from_zero=from_zero))

    assert {"0.01", "0.1", "1", "10"} <= set(labels(0.005, 30))
    assert "0.1" not in labels(0.005, 30, from_zero=True)
    assert {"4", "8"} <= {label.removesuffix(".0") for label in labels(4, 8)}
    assert "nan" not in "".join(labels(1, math.nan, 2))


def test_diagnostics_are_read_as_they_were_written() -> None:
    names = ("layers.0.experts.3.fc1[up]", "layers.11.experts.0.fc1[up]", "layers.2.fc1[up]")
    first, *others = (
        MatrixDiagnostics(names[0], 8, 6, 2, 1 / 3, 2.0, math.inf),
        MatrixDiagnostics(names[1], 8, 6, 2, 0.5, 3.0, 1.0),
        MatrixDiagnostics(names[2], 8, 6, 2, None, 0.0, 0.0),
    )
    snapshot = Snapshot(20, (first, *others))
    record = json.loads(json.dumps(diagnostics.to_record(snapshot), allow_nan=False))
    [snapshot] = diagnostics.read_diagnostics([{"kind": "train", "iteration": 20}, record])
    rounded = MatrixDiagnostics(names[0], 8, 6, 2, 0.33333, 2.0, None)
    assert snapshot == Snapshot(20, (rounded, *others))
    kind = "layers.*.experts.*.fc1[up]"
    assert diagnostics.by_kind([first, *others], "captured") == {kind: [1 / 3, 0.5]}
    assert diagnostics.by_kind([first, *others], "momentum_norm") == {
        kind: [1.0],
        "layers.*.fc1[up]": [0.0],
    }
    with pytest.raises(ValueError, match="the fields of its diagnostics are not rows, columns"):
        diagnostics.read_diagnostics([record | {"fields": ["rows"]}])


def test_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [run.train_record(i, run.loss_at(i)) for i in range(1, 4)]
    run_dir, other = (run.write_run(tmp_path / name, few) for name in ("run", "other"))
    picture = tmp_path / "losses.png"
    for options, path in (
        ([], run_dir / "report.html"),
        ([str(other), "--output", "{}", "--png", str(picture)], tmp_path / "page.html"),
    ):
        assert not call(["report", str(run_dir), *(word.format(path) for word in options)])
        assert path.read_text().startswith("<!doctype html>")
        assert f"wrote {path}, " in capsys.readouterr().out
    assert matplotlib.image.imread(picture).shape[1] > 1000
    for flag in ("--output", "--png"):
        with pytest.raises(ToolError, match="name another file with --output or --png"):
            call(["report", str(run_dir), flag, str(tmp_path / "none" / "file")])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "no config.json, so no run has started in it: give what was given to pretrain"),
        ({"config.json": '{"arguments": []}'}, "config.json is damaged"),
        ({"config.json": '{"arguments": {}}', "metrics.jsonl": "{}\n"}, "metrics.jsonl is damaged"),
        ({"config.json": '{"arguments": {}}', "routing.tsv": "x\ny\n"}, "routing.tsv is damaged"),
    ],
)
def test_what_is_no_run_ends_with_an_error(
    tmp_path: Path, files: dict[str, str] | None, said: str
) -> None:
    for name, text in (files or {}).items():
        (tmp_path / name).write_text(text)
    folder = tmp_path / "none" if files is None else tmp_path
    with pytest.raises(ToolError, match=re.escape(said)):
        call(["report", str(folder)])
