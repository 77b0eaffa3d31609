import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dion.megatron.run_directory import (
    append,
    git_revision,
    read_metrics,
    set_aside,
    write_config,
)
from megatron_dion.megatron.stopwatch import Stopwatch


def record(iteration: int, kind: str = "train") -> dict[str, Any]:
    return {"kind": kind, "iteration": iteration, "lm_loss": 1 / 3, "tokens": 100 * iteration}


def test_what_is_done_again_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    set_aside(path, 0)
    for kind, iteration in (("train", 1), ("train", 2), ("train", 3), ("validation", 2)):
        append(path, record(iteration, kind))
    with path.open("a") as file:
        file.write('{"kind": "tra')  # a killed process left it
    set_aside(path, math.inf)
    append(path, record(1, "test"))  # an evaluation of an earlier checkpoint
    set_aside(path, 2)
    append(path, record(3, "again"))
    of_one, of_two = [record(1), record(1, "test")], [record(2), record(2, "validation")]
    assert read_metrics(path) == [*of_one, *of_two, record(3, "again")]
    assert read_metrics(tmp_path / "metrics.replaced.jsonl") == [record(3)]


@pytest.mark.parametrize("line", [b'{"iteration": 2', b"[2]", b"{}", b"\xff", b""])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"iteration": 1}\n' + line + b'\n{"iteration": 3}\n'
    path.write_bytes(content)
    for function in (read_metrics, lambda path: set_aside(path, 2)):
        with pytest.raises(ValueError, match=rf"{path}:2 is damaged: mend or remove the line"):
            function(path)
    assert {one: one.read_bytes() for one in tmp_path.iterdir()} == {path: content}


def test_config_says_how_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--lr", "1e-3"])
    args = argparse.Namespace(device="cpu", world_size=4, lr=1e-3, params_dtype=torch.float32)
    write_config(tmp_path, args, {"lr": None, "seed": 1234})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["command_line"] == ["pretrain_gpt.py", "--lr", "1e-3"]
    assert config["arguments"]["params_dtype"] == "torch.float32"
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


def test_stopwatch_adds_up_and_starts_again() -> None:
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch.running():
            sum(range(1000))
    assert stopwatch.read() > 0
    assert stopwatch.read() == 0
