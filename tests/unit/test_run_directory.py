import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dion.megatron.progress import human_count, human_duration, progress_line
from megatron_dion.megatron.run_directory import (
    MetricsFile,
    Record,
    git_revision,
    read_metrics,
    write_config,
)
from megatron_dion.optimizer.stopwatch import Stopwatch


def record(iteration: int, kind: str = "train") -> dict[str, Any]:
    return {"kind": kind, "iteration": iteration, "lm_loss": 1 / 3, "tokens": 100 * iteration}


def test_resuming_drops_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, iterations_done=0)
    for iteration in (1, 2, 3):
        first.append(record(iteration))
    first.append(record(2, "validation"))
    first.append(record(3, "validation"))
    second = MetricsFile(path, iterations_done=2)
    assert second.dropped == 2
    second.append(record(3))
    assert read_metrics(path) == [record(1), record(2), record(2, "validation"), record(3)]


def test_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record(1)) + "\n" + '{"kind": "tra')
    assert read_metrics(path) == [record(1)]
    MetricsFile(path, iterations_done=1).append(record(2))
    assert read_metrics(path) == [record(1), record(2)]


def test_config_says_how_the_run_was_started(tmp_path: Path) -> None:
    args = argparse.Namespace(
        device="cpu", world_size=4, lr=1e-3, params_dtype=torch.float32, names={"b", "a"}
    )
    write_config(tmp_path, args, ["--lr", "1e-3"], {"lr": None, "seed": 1234})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["command_line"][1:] == ["--lr", "1e-3"]
    assert config["arguments"]["params_dtype"] == "torch.float32"
    assert config["arguments"]["names"] == ["a", "b"]
    assert config["defaults"] == {"lr": None, "seed": 1234}
    assert (config["platform"], config["world_size"]) == ("cpu", 4)
    assert set(config["versions"]) == {"torch", "megatron-core", "megatron_dion", "python"}
    assert "git_revision" in config


def test_revision_tells_whether_files_were_edited(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "first"], check=True)
    revision = git_revision(tmp_path)
    assert revision is not None
    assert len(revision) == 40
    (tmp_path / "file").write_text("two")
    assert git_revision(tmp_path) == f"{revision}-dirty"


@pytest.mark.parametrize("entropy", [None, 6.5])
def test_loss_is_drawn(tmp_path: Path, entropy: float | None) -> None:
    from megatron_dion.megatron.plot import draw_loss

    path = tmp_path / "loss.png"
    draw_loss([], path, entropy)
    assert not path.exists()
    records = [record(1), record(2), record(2, "validation"), record(2, "test")]
    draw_loss(records, path, entropy)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [found.name for found in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (950.4, "950"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (4.56e6, "4.56M"),
        (1e13, "10T"),
    ],
)
def test_counts_are_readable(count: float, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (18720, "5 h 12 min"),
        (2e5, "2 d 7 h"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("validation", "said"),
    [(None, ""), ({"iteration": 5, "lm_loss": 0.5}, " | validation 0.5000 at 5")],
)
def test_progress_line_has_everything(validation: Record | None, said: str) -> None:
    line = progress_line(
        record(10) | {"lr": 1e-3, "grad_norm": 4.18},
        train_iters=200,
        validation=validation,
        tokens_per_second=12345,
        seconds_left=200,
    )
    assert line == (
        f"iteration  10/200 | loss 0.3333{said} | lr 1.00e-03 | grad norm 4.180 | "
        "12.3k tokens/s | 3 min 20 s left"
    )


def test_stopwatch_adds_up_and_starts_again() -> None:
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch.running():
            sum(range(1000))
    assert stopwatch.read() > 0
    assert stopwatch.read() == 0
