"""`megatron-dion convergence check`, `update` and `compare`, with training that is made up."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_dion_tools import cli
from megatron_dion_tools.convergence import case_runs, command
from megatron_dion_tools.convergence.case import read_case
from megatron_dion_tools.convergence.case_runs import CaseRuns
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.runs import Run

STEPS = 40
CASE = """
description: a case
arguments: model.args
seeds: [1, 2, 3]
runs:
  one: {}
  two: {processes: 2, flags: --lr 1 --two}
  too fast: {flags: --lr 2}
  early: {continues: one, at: 10}
  late: {continues: one, at: 25, processes: 4, patch: "mistakes.py:forget"}
golden: [one]
checks:
  - {runs: [two], reference: one}
  - {runs: [early], reference: one, share: 0}
  - {runs: [too fast], reference: one, notices: true}
"""


def flag(run: Run, name: str) -> str:
    return run.flags[run.flags.index(name) + 1]


class Laboratory:
    """A folder with a case, and training that writes metrics without training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: list[str] = []
        self.shift: dict[str, float] = {}
        (folder / "model.args").write_text("--lr 1\n")
        (folder / "mistakes.py").write_text("")
        self.write(CASE)

    def write(self, text: str) -> None:
        (self.folder / "small.yaml").write_text(text)

    def execute(self, runs: Sequence[Run], jobs: int, report: Callable[[str], None]) -> None:
        for run in runs:
            if run.is_finished():
                continue
            self.trained.append(run.name)
            chance = random.Random(flag(run, "--seed"))
            level, lr = 5 + chance.gauss(0, 0.1), float(flag(run, "--lr"))
            level += self.shift.get(run.name.partition(",")[0], 0.0)
            losses = [level - lr * i / STEPS + chance.gauss(0, 0.01) for i in range(STEPS)]
            start = int(flag(run, "--ckpt-step")) if "--load" in run.flags else 0
            run.folder.mkdir(parents=True)
            lines = [
                {"kind": "train", "iteration": i, "lm_loss": loss, "grad_norm": loss}
                for i, loss in enumerate(losses, start=1)
                if i > start
            ]
            run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            run.mark_finished()

    def call(self, action: str, *words: str) -> int | None:
        case = [str(self.folder / "small.yaml"), "--output", str(self.folder / "runs")]
        return cli.call(["convergence", action, *case, *words])


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    laboratory = Laboratory(tmp_path)
    monkeypatch.setattr(command, "preload", lambda: None)
    monkeypatch.setattr(case_runs, "execute", laboratory.execute)
    return laboratory


def test_check_without_golden_curves_ends_before_training(laboratory: Laboratory) -> None:
    with pytest.raises(ToolError, match=r"seed-1\.jsonl: no such file: `convergence update` makes"):
        laboratory.call("check")
    assert laboratory.trained == []


def test_golden_runs_train_with_all_seeds_and_checks_with_the_first(laboratory: Laboratory) -> None:
    assert laboratory.call("update") == 0
    assert laboratory.trained == ["one, seed 1", "one, seed 2", "one, seed 3"]
    laboratory.trained.clear()
    assert laboratory.call("check") == 0
    names = ["one", "two", "too fast", "early"]  # also the run that is there already
    assert laboratory.trained == [f"{name}, seed 1" for name in names]
    assert (laboratory.folder / "runs" / "small.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("run", "shift", "said"),
    [
        ("one", 0.1, "FAILED  one follows golden one within 0.1 of the seed noise: lm_loss"),
        ("two", 0.1, "FAILED  two follows one within 0.1"),
        ("early", 1e-6, "FAILED  early follows one bit for bit: lm_loss: differs at iteration 11"),
    ],
)
def test_what_is_wrong_is_said_and_ends_with_status_1(
    laboratory: Laboratory, capsys: pytest.CaptureFixture[str], run: str, shift: float, said: str
) -> None:
    laboratory.call("update")
    laboratory.shift = {run: shift}
    assert laboratory.call("check") == 1
    assert said in capsys.readouterr().out


def test_a_mistake_that_nobody_notices_ends_with_status_1(
    laboratory: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    laboratory.write(CASE.replace("too fast: {flags: --lr 2}", "too fast: {}"))
    laboratory.call("update")
    assert laboratory.call("check") == 1
    assert "small: NOT NOTICED  too fast follows one" in capsys.readouterr().out


def test_what_diverged_never_becomes_golden(laboratory: Laboratory) -> None:
    laboratory.call("update")
    golden = laboratory.folder / "golden" / "small"
    before = {path: path.read_bytes() for path in golden.rglob("*") if path.is_file()}
    assert len(before) == 4
    laboratory.shift = {"one": float("nan")}
    with pytest.raises(ToolError, match="one, seed 1: a loss is not finite"):
        laboratory.call("update")
    assert before == {path: path.read_bytes() for path in golden.rglob("*") if path.is_file()}


def test_flags_of_runs_that_are_saved_and_continued(laboratory: Laboratory) -> None:
    folder = laboratory.folder / "runs"
    runs = CaseRuns(read_case(laboratory.folder / "small.yaml"), folder)
    saved = f"{folder}/one/seed-2/checkpoints"
    one, late = runs.run("one", 2), runs.run("late", 2)
    assert " ".join(one.flags) == f"--lr 1 --seed 2 --save {saved} --save-interval 5"
    assert " ".join(late.flags) == f"--lr 1 --seed 2 --load {saved} --ckpt-step 25"
    assert (late.processes, late.patch) == (4, f"{laboratory.folder}/mistakes.py:forget")
    assert late.folder == folder / "late" / "seed-2"


def test_compare_any_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, last in (("a", 2.0), ("b", 2.0), ("c", 2.5)):
        lines = [{"iteration": 1, "lm_loss": 3.0}, {"iteration": 2, "lm_loss": last}]
        text = "".join(json.dumps({"kind": "train", **line}) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    assert cli.call(["convergence", "compare", a, b]) == 0
    output = tmp_path / "pictures"
    assert cli.call(["convergence", "compare", a, b, c, "--output", str(output)]) == 1
    said = capsys.readouterr().out
    assert "c.jsonl follows" in said
    assert "differs at iteration 2: 2.5 against 2.0; 2 iterations, the last differ by +0.5" in said
    assert (output / "comparison.png").exists()
