"""What the report says of all kinds of runs; tests/browser looks at how it is shown."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dion.megatron.progress import human_count
from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion_tools.cli import main
from megatron_dion_tools.report.folder import read_folder
from megatron_dion_tools.report.page import render
from tests.pages import Page
from tests.run_folders import (
    ITERATIONS,
    LAYERS,
    MATRICES,
    RESUMED_AFTER,
    TOKENS,
    loss_at,
    metrics,
    routing_of_model,
    train_record,
    write_lines,
    write_run,
)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(write_run(tmp_path_factory.mktemp("runs") / "large & <new>"))


def page_of(run_dir: Path) -> Page:
    return Page(render(read_folder(run_dir)))


def paragraphs(page: Page) -> str:
    return "\n".join(page.texts("p"))


def test_head_tells_what_became_of_the_run(complete: Page) -> None:
    assert complete.texts("h1") == ["Run large & <new>"]
    assert f"Finished: iteration {ITERATIONS} of {ITERATIONS}." in paragraphs(complete)
    assert f"The run was resumed after iteration {RESUMED_AFTER}." in paragraphs(complete)
    facts = dict(zip(complete.texts("dt"), complete.texts("dd"), strict=True))
    last = [loss_at(i) for i in range(ITERATIONS - 9, ITERATIONS + 1)]
    assert facts == {
        "optimizer": "dion, rank fraction 0.25",
        "training loss, mean of 10": f"{sum(last) / 10:.4g}",
        "validation loss": "4.5",
        "tokens trained here": "410k",
        # Iterations that set things up took 9 s, all others half a second.
        "tokens per second": "4.10k",
        "in training steps": "1 min 57 s",
        "of it in the optimizer": f"{10 / 117:.1%}",
    }
    assert complete.texts("h2") == [
        *("Curves", "Throughput", "Routing", "Plan", "Diagnostics", "Environment")
    ]


def test_page_needs_nothing_else(complete: Page, tmp_path: Path) -> None:
    content = render(read_folder(write_run(tmp_path)))
    assert "http" not in content
    assert "url(" not in content
    assert not complete.all("link") + complete.all("img")
    assert complete.all("script") == [{}]
    anchors = {str(found["href"]) for found in complete.all("a")}
    assert anchors == {f"#{found['id']}" for found in complete.all("section")}


def test_charts_have_titles_values_and_words(complete: Page) -> None:
    titles = [caption.split(" ")[0] for caption in complete.texts("figcaption")]
    assert titles[:5] == ["Loss", "Gradient", "Learning", "Tokens", "Time"]
    loss, *_ = (found for found in complete.all("svg") if found.get("aria-label"))
    assert str(loss["aria-label"]).startswith("Loss: training from 8 to 4, mean of 10 from ")
    texts = complete.texts("text")
    assert texts.count("resumed") == 5 + 6  # and those of the diagnostics
    assert texts.count("iteration") == 5 + 6


def test_routing_has_sums_kinds_and_all(complete: Page) -> None:
    per_layer = sum(rows * columns for rows, columns in MATRICES.values())
    whole = LAYERS * (per_layer + 64) + 512 * 64
    share = f"{LAYERS * per_layer / whole:.1%}"
    assert ["dion", "12", "21", f"{LAYERS * per_layer:,}", share] in complete.rows
    kind = "decoder.layers.*.self_attention.linear_qkv.weight[key]"
    assert [kind, "32 × 64", "8", "dion", "linear layer", "3", "6,144"] in complete.rows
    norm = ["decoder.layers.*.input_layernorm.weight", "64", "–", "adam", "1-D", "3", "192"]
    assert norm in complete.rows
    one = "decoder.layers.2.mlp.linear_fc2.weight"
    assert [one, "64 × 160", "16", "dion", "linear layer"] in complete.rows


def test_plan_tells_memory_bytes_and_loads(complete: Page) -> None:
    names = [row[0] for row in complete.rows]
    wanted = ("weights", "momenta", "right factors", "exchange", "dion tensor left", "tp 1 dp 1")
    assert set(wanted) <= set(names)
    # Weights of 4 bytes, half of every matrix and of the vocabulary on a tensor-parallel rank.
    per_layer = sum(rows * columns for rows, columns in MATRICES.values())
    numbers = LAYERS * (per_layer // 2 + 2 * 64) + 512 * 64 + 64
    [weights] = [row for row in complete.rows if row[0] == "weights"]
    assert weights[1].endswith(" KiB")
    assert float(weights[1].split()[0]) == pytest.approx(4 * numbers / 1024, rel=0.03)


def test_diagnostics_have_curves_and_a_map(complete: Page) -> None:
    assert "Captured" in "".join(complete.texts("figcaption"))
    short = ["mlp.linear_fc1[gate]", "mlp.linear_fc1[up]", "mlp.linear_fc2"]
    [heading] = [row for row in complete.rows if row[:4] == ["layer", *short]][:1]
    assert heading[4:] == ["attention.linear_proj"] + [
        f"attention.linear_qkv[{part}]" for part in ("query", "key", "value")
    ]
    assert ["1", *(f"{0.6 + 0.01 * kind:.4g}" for kind in range(7))] in complete.rows
    shades = [str(found["style"]) for found in complete.all("td") if "style" in found]
    assert shades[0] == "--shade:0%"
    assert shades[len(MATRICES) * LAYERS - 1] == "--shade:100%"


def test_diagnostics_have_advice(complete: Page) -> None:
    [advice] = complete.texts("pre")
    assert "2 measured steps of iterations 150 to 200, 21 matrices" in advice
    assert "A rank fraction that would have captured 90% of the energy:" in advice


def test_environment_has_arguments_that_differ_first(complete: Page) -> None:
    assert ["torch", "2.9.0"] in complete.rows
    assert ["git revision", "not in a git repository"] in complete.rows
    start = [str(RESUMED_AFTER), "2026-11-24 20:55:02 UTC", "4: TP2 × DP2", "80", "164k", "4.10k"]
    assert start in complete.rows
    names = [row[0] for row in complete.rows]
    start = names.index("argument")
    following = names.index("argument", start + 1)
    assert ["lr", "0.008", "none"] in complete.rows[start:following]
    assert ["hidden_size", "64", "none"] in complete.rows[start:following]
    assert ["seed", "1234", "1234"] in complete.rows[following:]
    assert ["data_parallel_size", "2", "–"] in complete.rows[following:]
    assert "pretrain_gpt.py --optimizer dion --data-path 'a b'" in complete.texts("code")


def test_all_that_a_run_says_is_escaped(tmp_path: Path) -> None:
    reason = "<script>alert(1)</script>"
    page = page_of(write_run(tmp_path, routing=routing_of_model(reason=reason), save=reason))
    assert page.all("script") == [{}]
    assert reason in [cell for row in page.rows for cell in row]


def test_thousands_of_rows_are_folded(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, routing=routing_of_model(layers=500)))
    assert "All 4,001 matrices and parameters" in page.texts("summary")
    open_ones = [found for found in page.all("details") if "open" in found]
    assert len(open_ones) == 1  # of the diagnostics
    assert len(page.rows) > 4000


def test_unfinished_run(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, list(metrics())[:60]))
    assert "Unfinished: iteration 58 of 200." in paragraphs(page)
    assert "resumed" not in paragraphs(page)


def test_killed_run(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text()[:-7])
    page = page_of(run_dir)
    assert "The last line of metrics.jsonl is cut off" in paragraphs(page)
    assert "cut off" not in paragraphs(page_of(write_run(tmp_path / "whole")))


def test_loss_that_is_not_a_number(tmp_path: Path) -> None:
    losses = [math.nan if 30 <= i < 40 or i == 150 else loss_at(i) for i in range(1, 201)]
    losses[99] = math.inf
    records = [train_record(i, loss) for i, loss in enumerate(losses, start=1)]
    records[59] |= {"lm_loss": None, "skipped": True}
    page = page_of(write_run(tmp_path, records))
    said = paragraphs(page)
    assert "The training loss is not finite in iterations 30, 31, 32, 33, 34 and 7 more." in said
    assert "The step was skipped in iteration 60" in said
    assert any("broken" in str(found.get("class")) for found in page.all("path"))
    json.loads(str(page.all("figure")[0]["data-series"]), parse_constant=pytest.fail)


def test_loss_that_is_never_a_number(tmp_path: Path) -> None:
    records = [train_record(i, math.nan) for i in range(1, 201)]
    page = page_of(write_run(tmp_path, records))
    assert "Loss: no finite value was recorded." in page.texts("p")
    assert ("training loss, mean of 10", "NaN") in zip(
        page.texts("dt"), page.texts("dd"), strict=True
    )


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_other_optimizers(tmp_path: Path, optimizer: str) -> None:
    is_muon = optimizer == "muon"
    page = page_of(
        write_run(
            tmp_path,
            [train_record(i, loss_at(i)) for i in range(1, 201)],
            routing="",
            optimizer=optimizer,
            use_layer_wise_distributed_optimizer=is_muon,
            muon_tp_mode="blockwise",
            use_layer_wise_param_layout=True,
        )
    )
    said = paragraphs(page)
    assert f"Only runs with Dion have a routing; this one has --optimizer {optimizer}." in said
    assert "Only Dion has diagnostics." in said
    assert "Dion’s step" not in said
    assert "weights" in [row[0] for row in page.rows]


def test_run_without_diagnostics_says_how_to_get_them(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, [train_record(1, 8.0)]))
    assert "With --dion-log-interval N" in paragraphs(page)


def test_diagnostics_of_another_version(tmp_path: Path) -> None:
    records = [record for record in metrics() if record["kind"] == "diagnostics"]
    records[0] |= {"fields": ["rows"]}
    assert "read them with the version that wrote them" in paragraphs(
        page_of(write_run(tmp_path, [train_record(1, 8.0), *records]))
    )


def test_run_before_its_first_iteration(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, [], routing=""))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "starts.jsonl").unlink()
    assert paragraphs(page_of(tmp_path)) == paragraphs(page)
    assert "No iteration was recorded: it has not begun, or it ended before." in paragraphs(page)
    assert "There is no routing.tsv" in paragraphs(page)


def test_single_iteration(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, [train_record(1, 8.0)]))
    assert "Too few iterations were recorded." in paragraphs(page)
    assert page.all("circle")


def test_run_that_went_on_from_another_folder(tmp_path: Path) -> None:
    records = [train_record(i, loss_at(i)) for i in range(RESUMED_AFTER + 1, ITERATIONS + 1)]
    page = page_of(write_run(tmp_path, records))
    said = paragraphs(page)
    done = ITERATIONS - RESUMED_AFTER
    assert ("tokens trained here", human_count(TOKENS * done)) in zip(
        page.texts("dt"), page.texts("dd"), strict=True
    )
    assert f"The curves begin at iteration {RESUMED_AFTER + 1}" in said
    assert "was resumed" not in said


def test_each_start_has_its_own_tokens(tmp_path: Path) -> None:
    """The second went on from a model that had seen other tokens, on a faster machine."""
    run_dir = write_run(tmp_path)
    records = read_metrics(run_dir / "metrics.jsonl")
    for record in records:
        if record["kind"] == "train" and record["iteration"] > RESUMED_AFTER:
            record["tokens"] += 10**9
            record["iteration_seconds"] /= 2
    write_lines(run_dir / "metrics.jsonl", records)
    starts = read_metrics(run_dir / "starts.jsonl")
    starts[1]["tokens"] += 10**9
    write_lines(run_dir / "starts.jsonl", starts)
    page = page_of(run_dir)
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert (facts["tokens trained here"], facts["tokens per second"]) == ("410k", "8.19k")
    assert [row[3:] for row in page.rows if row[2:3] == ["4: TP2 × DP2"]] == [
        ["120", "246k", "4.10k"],
        ["80", "164k", "8.19k"],
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"multi_latent_attention": True}, "--multi-latent-attention: such models"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual pipeline stages"),
        ({"num_layers": 4}, "other matrices than planned, such as decoder.layers.3."),
        ({"optimizer": "sgd"}, "--optimizer sgd"),
        ({"global_batch_size": 7}, "--global-batch-size 7"),
    ],
)
def test_run_that_the_planner_does_not_know(
    tmp_path: Path, arguments: dict[str, object], reason: str
) -> None:
    said = paragraphs(page_of(write_run(tmp_path, **arguments)))
    assert "The planner does not know this run: " in said
    assert reason in said


def test_config_without_defaults(tmp_path: Path) -> None:
    config = json.loads((write_run(tmp_path) / "config.json").read_text())
    del config["defaults"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = page_of(tmp_path)
    assert "does not tell the defaults" in paragraphs(page)
    assert ["lr", "0.008", "–"] in page.rows


def test_report_imports_neither_megatron_nor_matplotlib() -> None:
    code = "import sys, megatron_dion_tools.report.command; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.split(".")[0] for name in said.stdout.split()}
    assert "torch" in imported
    assert not imported & {"megatron", "matplotlib"}


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", end)


@pytest.mark.usefixtures("ended")
def test_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    for options, path in (
        ([], tmp_path / "run" / "report.html"),
        (["--output", str(tmp_path / "page.html")], tmp_path / "page.html"),
    ):
        with pytest.raises(SystemExit) as code:
            main(["report", str(tmp_path / "run"), *options])
        assert not code.value.code
        assert path.read_text().startswith("<!doctype html>")
        assert f"wrote {path}, " in capsys.readouterr().out


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "none: no such folder; give what was given to pretrain_gpt.py's --run-dir"),
        ("empty", "empty: no config.json, so no run has started in it: what pretrain_gpt.py"),
        ("refused", "refused/train.log says why: --lr is odd"),
        ("killed", "killed/train.log says why"),
        ("runs", "runs: no config.json in it, but 1 folders with one: "),
        ("bad-config", "config.json is damaged"),
        ("bad-metrics", "metrics.jsonl is damaged"),
        ("bad-kind", "metrics.jsonl is damaged"),
        ("bad-routing", "routing.tsv is damaged"),
        ("no-place", "name another file with --output"),
    ],
)
def test_what_is_no_run_ends_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    for refused, log in (
        ("refused", "noise\nerror: --lr is odd\nerror: too\n"),
        ("killed", "noise"),
    ):
        (tmp_path / refused).mkdir()
        (tmp_path / refused / "train.log").write_text(log)
    write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "bad-config")
    (tmp_path / "bad-config" / "config.json").write_text('{"arguments": []}')
    write_run(tmp_path / "bad-metrics")
    (tmp_path / "bad-metrics" / "metrics.jsonl").write_text('{"kind": "tra\n{}\n')
    write_run(tmp_path / "bad-kind", [{"iteration": 1}])
    write_run(tmp_path / "bad-routing", routing="parameter\tshape\nx\t3x\n")
    write_run(tmp_path / "no-place")
    output = ["--output", str(tmp_path / "nowhere" / "page.html")] if name == "no-place" else []
    with pytest.raises(SystemExit) as code:
        main(["report", str(tmp_path / name), *output])
    assert code.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
