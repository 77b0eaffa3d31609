import io
import json
import sys
from pathlib import Path

import pytest

import quick_start as tool
from megatron_dion.commands.errors import ToolError


@pytest.fixture
def data(tmp_path: Path) -> tool.Data:
    data = tool.Data(tmp_path)
    description = data.dataset("train").with_suffix(".json")
    description.write_text(json.dumps({"unigram_entropy_nats": 6.25}))
    return data


def write_metrics(run_dir: Path, iterations: int) -> None:
    training = [
        {"kind": "train", "iteration": i, "lm_loss": 10.0 - i, "tokens": 100 * i}
        | {"iteration_seconds": 9.0 if i == 1 else 0.5}
        for i in range(1, iterations + 1)
    ]
    validation = [{"kind": "validation", "iteration": i, "lm_loss": 5.0 + i} for i in (1, 2)]
    lines = [json.dumps(record) for record in training + validation]
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("devices", "processes", "tensor_parallel"),
    [(0, 4, 2), (1, 1, 1), (2, 2, 2), (3, 2, 2), (4, 4, 2), (8, 4, 2)],
)
def test_layout_fits_the_machine(devices: int, processes: int, tensor_parallel: int) -> None:
    layout = tool.choose_layout(devices, has_engine=True)
    assert layout == tool.Layout(processes, tensor_parallel, tensor_parallel > 1)


def test_cuda_without_transformer_engine_gets_no_sequence_parallelism() -> None:
    assert not tool.choose_layout(4, has_engine=False).sequence_parallel
    assert tool.choose_layout(0, has_engine=False).sequence_parallel


def test_arguments_file_has_comments_and_values(tmp_path: Path) -> None:
    path = tmp_path / "some.args"
    path.write_text("# a comment\n--lr 0.01  # why\n\n--swiglu\n--name 'two words'\n")
    assert tool.read_flags(path) == ("--lr", "0.01", "--swiglu", "--name", "two words")


def test_overrides_come_last(data: tool.Data, tmp_path: Path) -> None:
    command = tool.training_command(data, tmp_path, tool.Layout(4, 2), ["--lr", "7"])
    assert command[-2:] == ["--lr", "7"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert command[command.index("--tensor-model-parallel-size") + 1] == "2"


def test_only_progress_lines_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    lines = ["noise\n", "[dion] loss 3\n", "not [dion] this\n"]
    tool.relay(lines, log)
    assert log.getvalue() == "".join(lines)
    assert capsys.readouterr().out == "loss 3\n"


def test_summary_has_losses_entropy_and_speed(data: tool.Data, tmp_path: Path) -> None:
    write_metrics(tmp_path, iterations=2)
    summary = tool.summarize(tmp_path, data)
    assert "train loss 8.500 (mean of the last 2 iterations)" in summary
    assert "validation loss 7.000" in summary
    assert "unigram entropy of the corpus 6.250" in summary
    assert "200 tokens/s" in summary
    assert str(tmp_path) in summary


def test_summary_without_training_is_an_error(data: tool.Data, tmp_path: Path) -> None:
    write_metrics(tmp_path, iterations=0)
    with pytest.raises(ToolError, match="no training iteration"):
        tool.summarize(tmp_path, data)


def test_command_for_the_report_can_be_typed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert tool.report_command(tmp_path / "runs" / "1") == ".venv/bin/megatron-dion report runs/1"


def test_named_error_is_shown_alone_and_once(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("noise\nerror: --lr is odd\nmore\nerror: --lr is odd\n")
    shown = tool.explain_failure(log, 1).splitlines()
    assert shown[0] == "error: --lr is odd"
    assert len(shown) == 2
    assert str(log) in shown[1]


def test_unnamed_error_shows_the_end_before_the_launchers_report(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    report = [f"W x/{tool.LAUNCHER_MARK}/api.py closing", *["report"] * 50]
    log.write_text("\n".join([*map(str, range(100)), "Error: why", *report]))
    shown = tool.explain_failure(log, 1).splitlines()
    assert shown[-2] == "Error: why"
    assert len(shown) == tool.LOG_LINES_SHOWN + 1


def test_failing_training_gives_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('[dion] started'); print('error: bad'); sys.exit(3)"
    with pytest.raises(SystemExit) as ended:
        tool.train([sys.executable, "-c", code], tmp_path / "train.log")
    assert ended.value.code == 3
    shown = capsys.readouterr()
    assert shown.out == "started\n"
    assert shown.err.startswith("error: bad\n")


def test_recipe_trains_with_dion_and_the_distributed_optimizer() -> None:
    arguments = tool.read_flags(tool.ARGUMENTS)
    assert "--use-distributed-optimizer" in arguments
    assert arguments[arguments.index("--optimizer") + 1] == "dion"
