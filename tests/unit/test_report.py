"""What the report says of all kinds of runs."""

import base64
import json
import math
import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from megatron_dion.optimizer import diagnostics
from megatron_dion.optimizer.diagnostics import MatrixDiagnostics, Snapshot
from megatron_dion_tools.cli import call
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.report.charts import Chart, Curve
from megatron_dion_tools.report.folder import read_folder
from megatron_dion_tools.report.page import render
from tests import run_folders as run

REASON = "<script>linear</script> layer"


class Page:
    """A page about a run."""

    def __init__(self, run_dir: Path) -> None:
        self.html = render(read_folder(run_dir))
        self.soup = BeautifulSoup(self.html, "html.parser")
        self.said = "\n".join(self.texts("p"))
        self.facts = dict(zip(self.texts("dt"), self.texts("dd"), strict=True))
        self.rows = [
            [cell.text for cell in row.find_all(["th", "td"])] for row in self.soup.find_all("tr")
        ]

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.soup.select(selector)]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(run.write_run(tmp_path_factory.mktemp("runs") / "large & <new>", reason=REASON))


def test_head_tells_what_became_of_the_run(complete: Page) -> None:
    assert complete.texts("h1") == ["Run large & <new>"]
    assert f"Finished: iteration {run.ITERATIONS} of {run.ITERATIONS}." in complete.said
    assert f"The run was resumed after iteration {run.RESUMED_AFTER}." in complete.said
    last = [run.loss_at(i) for i in range(run.ITERATIONS - 9, run.ITERATIONS + 1)]
    assert complete.facts == {
        "optimizer": "dion, rank fraction 0.25",
        "training loss, mean of 10": f"{sum(last) / 10:.4g}",
        "validation loss": "4.5",
        "tokens": "409,600",
        # Iterations that set things up took 9 s, all others half a second.
        "tokens/s, median": "4096",
        "time, in optimizer": f"0:01:57, {10 / 117:.1%}",
        "sent per step": "0.001 MB",
    }


def test_page_needs_nothing_else(complete: Page) -> None:
    assert complete.html.startswith("<!doctype html>")
    assert not complete.soup.find_all(["link", "script", "iframe"])
    for element in complete.soup.find_all(True):
        for name in ("href", "src"):
            assert str(element.get(name, "#")).startswith(("#", "data:image/svg+xml;base64,"))
    anchors = {str(link["href"]) for link in complete.soup.select("nav a")}
    assert anchors == {f"#{section['id']}" for section in complete.soup.find_all("section")}


def words(svg: str | None) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg or "")


def test_charts_have_titles_and_last_values(complete: Page) -> None:
    pictures = {str(image["alt"]): str(image["src"]) for image in complete.soup.find_all("img")}
    charts = {
        title: words(base64.b64decode(source.partition(",")[2]).decode())
        for title, source in pictures.items()
    }
    legend = {"training 4", "validation 4.5", "resumed", "iteration"}
    assert legend <= set(charts["Loss"])
    assert "rate 0.008" in charts["Learning rate"]
    assert {"iteration 0.5", "optimizer’s step 0.05"} <= set(charts["Time"])
    assert "mlp.linear_fc1[gate] 4" in charts["Update"]
    assert "mlp.linear_fc2 0.62" in charts["Captured share"]  # the median over three layers
    assert len(charts) == 8


def test_tables_have_sums_kinds_layers_and_all(complete: Page) -> None:
    per_layer = sum(rows * columns for rows, columns in run.MATRICES.values())
    share = run.LAYERS * per_layer / (run.LAYERS * (per_layer + 64) + 512 * 64)
    assert ["dion", "12", "15", f"{run.LAYERS * per_layer:,}", f"{share:.1%}"] in complete.rows
    kind = "decoder.layers.*.self_attention.linear_qkv.weight[key]"
    assert [kind, "32 × 64", "8", "dion", REASON, "3", "6,144"] in complete.rows
    norm = ["decoder.layers.*.input_layernorm.weight", "64", "–", "adam", "1-D", "3", "192"]
    assert norm in complete.rows
    one = "decoder.layers.2.mlp.linear_fc2.weight"
    assert [one, "64 × 160", "16", "dion", REASON] in complete.rows
    assert [one, "64 × 160", "16", "0.72", "4", "0.5"] in complete.rows


def test_environment_has_arguments_that_differ_first(complete: Page) -> None:
    assert ["git revision", "not in a git repository"] in complete.rows
    start = [str(run.RESUMED_AFTER), "245,760", "2026-11-24 20:55:02 UTC", "4: TP2 × DP2"]
    assert start in complete.rows
    first, second = (i for i, row in enumerate(complete.rows) if row[0] == "argument")
    assert ["lr", "0.008", "none"] in complete.rows[first:second]
    assert ["seed", "1234", "1234"] in complete.rows[second:]
    assert ["train_iters", "200", "–"] in complete.rows[second:]
    assert "pretrain_gpt.py --optimizer dion --data-path 'a b'" in complete.texts("code")


def test_what_a_run_has_not_recorded_is_said(tmp_path: Path) -> None:
    losses = [math.nan if 30 <= i < 36 else run.loss_at(i) for i in range(1, 101)]
    records = [run.train_record(i, loss) for i, loss in enumerate(losses, start=1)]
    records[59] |= {"lm_loss": None, "skipped": True}
    page = Page(run.write_run(tmp_path, records))
    assert "Unfinished: iteration 100 of 200." in page.said
    assert "The training loss is not finite in iteration 30 and 5 more." in page.said
    assert "The step was skipped in iteration 60" in page.said
    assert "resumed" not in page.said
    assert "With --dion-log-interval N" in page.said
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-7])
    assert "The last line of metrics.jsonl is cut off" in Page(tmp_path).said

    page = Page(run.write_run(tmp_path, [run.train_record(7, math.nan)]))
    assert "Curves begin at iteration 7" in page.said
    assert page.facts["training loss, mean of 1"] == "nan"
    assert page.said.count("no finite value was recorded.") == 3  # nor were there times

    for name in ("metrics.jsonl", "starts.jsonl"):
        (tmp_path / name).unlink()
    page = Page(tmp_path)
    assert "No iteration was recorded" in page.said
    assert "There is no routing.tsv" in page.said
    assert page.said.count("no finite value was recorded.") == 5

    page = Page(run.write_run(tmp_path, [], optimizer="muon"))
    assert "Only runs with Dion have a routing; this one has --optimizer muon." in page.said
    assert "Only Dion has diagnostics." in page.said
    assert page.facts == {"optimizer": "muon"}


def test_axes_are_logarithmic_where_values_differ_in_magnitude() -> None:
    def labels(*values: float, from_zero: bool = False) -> list[str]:
        return words(
            Chart("", "", [Curve("", list(enumerate(values)))], from_zero=from_zero).svg([])
        )

    assert {"0.01", "0.1", "1", "10"} <= set(labels(0.005, 30))
    assert "0.1" not in labels(0.005, 30, from_zero=True)
    assert {"4.0", "5.0"} <= set(labels(4, 8))
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
    run_dir = run.write_run(tmp_path / "run", [])
    for options, path in (([], run_dir / "report.html"), (["--output"], tmp_path / "page.html")):
        assert not call(["report", str(run_dir), *options, *(str(path) for _ in options)])
        assert path.read_text().startswith("<!doctype html>")
        assert f"wrote {path}, " in capsys.readouterr().out
    with pytest.raises(ToolError, match="name another file with --output"):
        call(["report", str(run_dir), "--output", str(tmp_path / "none" / "page.html")])


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
