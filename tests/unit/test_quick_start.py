"""What `make train` starts, and what it says of a training that fails."""

import shlex
import sys
from pathlib import Path

import pytest

import quick_start as tool
from megatron_dion_tools.data.prepared import Data
from tests.documentation.pages import blocks_of
from tests.project import words_from_make


def command_for(run_dir: Path, devices: int = 0, overrides: str = "") -> list[str]:
    data = Data(run_dir / "data")
    return tool.training_command(data, run_dir, devices, shlex.split(overrides))


@pytest.mark.parametrize(
    ("devices", "processes", "tensor_parallel"),
    [(0, 4, 2), (1, 1, 1), (2, 2, 2), (3, 2, 2), (4, 4, 2), (8, 4, 2)],
)
def test_command_fits_the_machine_and_overrides_come_last(
    tmp_path: Path, devices: int, processes: int, tensor_parallel: int
) -> None:
    command = command_for(tmp_path, devices, "--lr 7")
    assert command[-2:] == ["--lr", "7"]
    assert command[command.index("--nproc-per-node") + 1] == str(processes)
    size = command[command.index("--tensor-model-parallel-size") + 1]
    assert size == str(tensor_parallel)
    assert command[command.index("--optimizer") + 1] == "dion"
    assert "--use-distributed-optimizer" in command


@pytest.mark.parametrize(
    ("overrides", "run_dir", "flags"),
    [
        ("", "runs/2", "--load runs/2/checkpoints --train-iters 600"),
        ("--run-dir mine", "mine", "--run-dir mine --load runs/2/checkpoints --train-iters 600"),
        (
            "--dion-rank-fraction 0.5 '--save=a b' --load old --train-iters 400",
            "runs/2",
            "--dion-rank-fraction 0.5 '--save=a b' --load old --train-iters 400"
            " --load 'a b' --train-iters 800",
        ),
    ],
)
def test_commands_at_the_end_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, overrides: str, run_dir: str, flags: str
) -> None:
    monkeypatch.chdir(tool.ROOT)
    monkeypatch.setattr(sys, "executable", str(tool.ROOT / ".venv" / "bin" / "python"))
    command = command_for(tool.ROOT / "runs" / "2", overrides=overrides)
    report, resume = tool.next_commands(command, shlex.split(overrides))
    assert report == f".venv/bin/megatron-dion report {run_dir}"
    make, train, arguments = shlex.split(resume)
    assert (make, train) == ("make", "train")
    shown = shlex.split(arguments.removeprefix("ARGS="))
    assert shown == shlex.split(f"{flags} --override-opt-param-scheduler")


def test_unnamed_error_shows_the_end_before_the_launchers_report() -> None:
    report = [f"W x/{tool.LAUNCHER_MARK}/api.py closing", *["report"] * 50]
    errors, shown = tool.explain("\n".join([*map(str, range(100)), "Error: why", *report]))
    assert errors == []
    assert shown[-1] == "Error: why"
    assert len(shown) == tool.LOG_LINES_SHOWN


@pytest.mark.parametrize(
    ("code", "has_trained", "is_there"),
    [
        ("print('error: bad\\nerror: bad')", False, False),
        ("print('error: bad')", True, True),
        ("print('who knows')", False, True),
    ],
)
def test_failing_training_says_why_and_a_refused_run_leaves_no_folder(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: str,
    has_trained: bool,
    is_there: bool,
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if has_trained:
        (run_dir / "metrics.jsonl").write_text("{}\n")
    program = f"import sys; print('[dion] started\\nnoise'); {code}; sys.exit(3)"
    with pytest.raises(SystemExit) as ended:
        tool.train([sys.executable, "-c", program], run_dir / "train.log")
    assert ended.value.code == 3
    assert run_dir.exists() == is_there
    said = capsys.readouterr()
    assert said.out == "started\n"
    *first, last = said.err.splitlines()
    assert last in code
    assert first == ([f"training failed; the whole log is {run_dir / 'train.log'}"] * is_there) or (
        "[dion] started" in first
    )


def test_make_train_hands_on_the_flags_of_the_page() -> None:
    """Those in quotes over two lines, too; make only says what it would run."""
    blocks = blocks_of("docs/quickstart.md")
    code = "".join(block.code for block in blocks if block.language == "bash")
    shown = [word for word in shlex.split(code, comments=True) if word.startswith("ARGS=")]
    assert [" ".join(words_from_make("train", setting)) for setting in ("ARGS=", *shown)] == [
        "tools/quick_start.py",
        "tools/quick_start.py -- --dion-rank-fraction 0.5",
        "tools/quick_start.py -- --load RUN_DIR/checkpoints --train-iters 400"
        " --override-opt-param-scheduler --tensor-model-parallel-size 1 --micro-batch-size 2",
    ]
