import io
import shlex
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import quick_start as tool
from tests.documentation.pages import blocks_of
from tests.project import words_from_make


@pytest.fixture
def data(tmp_path: Path) -> tool.Data:
    return tool.Data(tmp_path)


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


def test_command_for_the_report_can_be_typed_here(
    data: tool.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    for overrides, shown in (([], "runs/1"), (["--run-dir", "mine"], "mine")):
        command = tool.training_command(data, tmp_path / "runs" / "1", tool.Layout(4, 2), overrides)
        assert tool.report_command(command) == f".venv/bin/megatron-dion report {shown}"


def test_command_to_go_on_has_what_was_changed_and_the_last_checkpoint(
    data: tool.Data,
) -> None:
    changed = "--dion-rank-fraction 0.5 --load runs/1/checkpoints --train-iters 400".split()
    command = tool.training_command(data, tool.ROOT / "runs" / "2", tool.Layout(4, 2), changed)
    assert tool.resume_command(command, changed) == (
        "make train ARGS='--dion-rank-fraction 0.5 --load runs/2/checkpoints --train-iters 800"
        " --override-opt-param-scheduler'"
    )
    elsewhere = ["--save=checkpoints/a b"]
    command = tool.training_command(data, tool.ROOT / "runs" / "2", tool.Layout(4, 2), elsewhere)
    [shown] = shlex.split(tool.resume_command(command, elsewhere).partition("ARGS=")[2])
    assert shlex.split(shown)[:3] == [*elsewhere, "--load", "checkpoints/a b"]


def test_named_errors_are_found_once() -> None:
    log = "noise\nerror: --lr is odd\nmore\nerror: --lr is odd\n"
    assert tool.errors_in(log) == ["error: --lr is odd"]
    assert tool.errors_in("noise\nno error: here\n") == []


def test_unnamed_error_shows_the_end_before_the_launchers_report() -> None:
    report = [f"W x/{tool.LAUNCHER_MARK}/api.py closing", *["report"] * 50]
    shown = tool.last_lines("\n".join([*map(str, range(100)), "Error: why", *report]))
    assert shown[-1] == "Error: why"
    assert len(shown) == tool.LOG_LINES_SHOWN


def failure(rank: int, exit_code: int) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exit_code, error_file="none")


@pytest.mark.parametrize(("exit_code", "status"), [(2, 2), (1, 1), (-11, 1)])
def test_status_is_that_of_the_rank_that_failed_first(exit_code: int, status: int) -> None:
    failures = {0: failure(0, exit_code), 1: failure(1, 3)}
    failures[1].timestamp = failures[0].timestamp + 1
    report = str(ChildFailedError("pretrain_gpt.py", failures))
    assert tool.status_of(f"some lines\n{report}", 1) == status


def test_failing_training_ends_with_the_error_and_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('[dion] started'); print('error: bad'); sys.exit(3)"
    with pytest.raises(SystemExit) as ended:
        tool.train([sys.executable, "-c", code], tmp_path / "train.log")
    assert ended.value.code == 3
    shown = capsys.readouterr()
    assert shown.out == "started\n"
    first, last = shown.err.splitlines()
    assert "status 3" in first
    assert str(tmp_path / "train.log") in first
    assert last == "error: bad"


@pytest.mark.parametrize(
    ("code", "has_trained", "is_kept"),
    [
        ("print('error: bad'); sys.exit(2)", False, False),
        ("print('error: bad'); sys.exit(2)", True, True),
        ("print('error: bad'); sys.exit(1)", False, True),
        ("print('who knows'); sys.exit(2)", False, True),
    ],
)
def test_refused_run_leaves_no_folder(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: str,
    has_trained: bool,
    is_kept: bool,
) -> None:
    run_dir = tool.make_run_dir(tmp_path)
    if has_trained:
        (run_dir / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        tool.train([sys.executable, "-c", f"import sys; {code}"], run_dir / "train.log")
    assert run_dir.exists() == is_kept
    said = capsys.readouterr().err
    assert ("train.log" in said) == is_kept
    assert said.splitlines()[-1] in code


def test_recipe_trains_with_dion_and_the_distributed_optimizer() -> None:
    arguments = tool.read_flags(tool.ARGUMENTS)
    assert "--use-distributed-optimizer" in arguments
    assert arguments[arguments.index("--optimizer") + 1] == "dion"


def test_make_train_hands_on_the_flags_of_the_page() -> None:
    """Those in quotes over two lines, too; make only says what it would run."""
    code = "".join(block.code for block in blocks_of("README.md"))
    shown = [word for word in shlex.split(code, comments=True) if word.startswith("ARGS=")]
    assert [" ".join(words_from_make("train", setting)) for setting in ("ARGS=", *shown)] == [
        "tools/quick_start.py",
        "tools/quick_start.py -- --dion-rank-fraction 0.5",
        "tools/quick_start.py -- --load RUN_DIR/checkpoints --train-iters 400"
        " --override-opt-param-scheduler --tensor-model-parallel-size 1 --micro-batch-size 2",
    ]
