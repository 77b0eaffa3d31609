"""The command line of convergence tests, with made-up training."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_dion_tools import cli
from megatron_dion_tools.convergence import command as tool
from megatron_dion_tools.convergence import trainer
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.runs import Run

STEPS = 40
CASE = """
description: a case
arguments: model.args
seeds: [1, 2, 3]
short: true
runs:
  one: {}
  two: {processes: 2}
golden: [one]
checks:
  - band: {run: two, reference: one}
controls:
  too fast: {instead_of: one, flags: --lr 2, noticed_by: [exact, band]}
"""

Losses = Callable[[Run, int], list[float]]


def losses(run: Run, seed: int) -> list[float]:
    """By seed; with another learning rate they fall faster."""
    chance = random.Random(seed)
    shift = chance.gauss(0, 0.1)
    lr = float(run.flags[run.flags.index("--lr") + 1])
    return [5 + shift - lr * i / STEPS + chance.gauss(0, 0.01) for i in range(STEPS)]


class Laboratory:
    """A folder with a case, and training that writes metrics without training."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.losses: Losses = losses
        self.trained: list[str] = []
        self._monkeypatch = monkeypatch
        (folder / "model.args").write_text("--lr 1\n")
        (folder / "small.yaml").write_text(CASE)
        monkeypatch.setattr(tool, "preload", lambda: None)
        monkeypatch.setattr(trainer, "execute", self._execute)

    def _execute(self, runs: Sequence[Run], jobs: int, report: Callable[[str], None]) -> None:
        for run in runs:
            self.trained.append(run.name)
            values = self.losses(run, int(run.flags[run.flags.index("--seed") + 1]))
            run.folder.mkdir(parents=True)
            lines = [
                json.dumps({"kind": "train", "iteration": i, "lm_loss": loss, "grad_norm": loss})
                for i, loss in enumerate(values, start=1)
            ]
            run.metrics.write_text("\n".join(lines) + "\n")
            run.mark_finished()

    def call(self, command: str, *argv: str) -> None:
        case = [str(self.folder / "small.yaml"), "--output", str(self.folder / "runs")]
        self.call_exactly(command, *case, *argv)

    def call_exactly(self, *argv: str) -> None:
        cli.call(["convergence", *argv])

    @property
    def golden(self) -> Path:
        return self.folder / "golden" / "small.jsonl"


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    return Laboratory(tmp_path, monkeypatch)


@pytest.fixture
def with_golden(laboratory: Laboratory) -> Laboratory:
    laboratory.call("update", "--write")
    laboratory.trained.clear()
    return laboratory


def test_update_writes_only_when_told(
    laboratory: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    laboratory.call("update")
    assert laboratory.trained == ["one, seed 1", "one, seed 2", "one, seed 3"]
    assert not laboratory.golden.exists()
    said = capsys.readouterr().out
    assert "small: one: new, 3 seeds" in said
    assert "nothing written; --write" in said

    laboratory.call("update", "--write")
    assert laboratory.golden.exists()


def test_update_shows_what_changes(
    with_golden: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    with_golden.losses = lambda run, seed: [*losses(run, seed)[:-1], 1.0]
    with_golden.call("update")
    assert "small: one: lm_loss: differs from iteration 40" in capsys.readouterr().out


def test_update_refuses_what_is_not_finite(with_golden: Laboratory) -> None:
    before = with_golden.golden.read_bytes()
    with_golden.losses = lambda run, seed: [*losses(run, seed)[:-1], math.nan]
    with pytest.raises(ToolError, match=r"one, seed 1: .* is nan at iteration 40.*nothing was"):
        with_golden.call("update", "--write")
    assert with_golden.golden.read_bytes() == before


def test_check_trains_and_reports(
    with_golden: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    with_golden.call("check", "--controls")
    assert with_golden.trained == ["one, seed 1", "two, seed 1", "too fast, seed 1"]
    said = capsys.readouterr().out
    assert "1 case, 1 passed, 0 failed" in said
    assert "2 of 2 mistakes noticed" in said
    assert (
        "<h1>Convergence: 1 case, 1 passed" in (with_golden.folder / "runs/report.html").read_text()
    )
    assert (with_golden.folder / "runs" / "small.png").read_bytes()[1:4] == b"PNG"

    with_golden.trained.clear()
    with_golden.call("report", "--controls")
    assert with_golden.trained == []
    assert "1 case, 1 passed" in capsys.readouterr().out


def test_check_fails_where_a_run_differs(
    with_golden: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    shift = 0.05
    with_golden.losses = lambda run, seed: [
        loss + shift * (run.processes == 2 and i >= 20) for i, loss in enumerate(losses(run, seed))
    ]
    with pytest.raises(SystemExit) as stop:
        with_golden.call("check")
    assert stop.value.code == 1
    first = capsys.readouterr().out.splitlines()[1]
    assert first.startswith("FAILED  small: two, seed 1 follows one, seed 1")
    assert "leaves the band at iteration 2" in first


def test_check_fails_where_a_mistake_is_not_noticed(
    with_golden: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    (with_golden.folder / "small.yaml").write_text(CASE.replace("--lr 2", "--lr 1"))
    with pytest.raises(SystemExit) as stop:
        with_golden.call("check", "--controls")
    assert stop.value.code == 1
    assert "NOT NOTICED" in capsys.readouterr().out


def test_check_refuses_changed_flags_before_training(with_golden: Laboratory) -> None:
    (with_golden.folder / "model.args").write_text("--lr 1.5\n")
    with pytest.raises(ToolError, match=r"made with other flags.*then '--lr 1', now '--lr 1.5'"):
        with_golden.call("check")
    assert with_golden.trained == []


def test_check_without_golden_curves_says_so_before_training(laboratory: Laboratory) -> None:
    with pytest.raises(ToolError, match="no golden curves yet; make them with `update`"):
        laboratory.call("check")
    assert laboratory.trained == []


def test_only_short_cases(laboratory: Laboratory) -> None:
    (laboratory.folder / "small.yaml").write_text(CASE.replace("short: true", "short: false"))
    with pytest.raises(ToolError, match="--short leaves out all"):
        laboratory.call("run", "--short")


def test_compare_runs(with_golden: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    with_golden.call("run", "--controls")
    runs = with_golden.folder / "runs" / "small"
    one, two = str(runs / "one" / "seed-1"), str(runs / "two" / "seed-1")
    with_golden.call_exactly("compare", one, two)
    assert "the same numbers in 40 iterations" in capsys.readouterr().out

    other = str(runs / "too fast" / "seed-1")
    page = with_golden.folder / "out"
    with pytest.raises(SystemExit) as stop:
        with_golden.call_exactly("compare", one, other, "--output", str(page))
    assert stop.value.code == 1
    assert "first differs at iteration 2" in capsys.readouterr().out
    assert {file.name for file in page.iterdir()} == {"comparison.png", "comparison.html"}


def test_compare_needs_two_runs(laboratory: Laboratory) -> None:
    with pytest.raises(ToolError, match="needs two runs or more"):
        laboratory.call_exactly("compare", str(laboratory.folder))
