"""`megatron-dion convergence sweep` with training that is made up."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_dion_tools import cli
from megatron_dion_tools.convergence import command
from megatron_dion_tools.convergence import study as study_module
from megatron_dion_tools.convergence.pictures import draw_study
from megatron_dion_tools.convergence.study import (
    StudyRuns,
    best_rate,
    estimate,
    read_study,
    to_json,
    to_markdown,
)
from megatron_dion_tools.local.runs import Run

STEPS = 48
TEXT = """
question: Which is better?
arguments: common.args
axes: {width: {"64": --hidden-size 64, "128": ""}}
methods:
  Base: {flags: --optimizer adam, lr: 0.004}
  New: {flags: --optimizer dion, lr: 0.008}
baseline: Base
seeds: [1, 2, 3]
"""

Loss = Callable[[str, float, int], float]
"""Final loss of an optimizer at a learning rate with a seed."""


def parabola(optimizer: str, lr: float, seed: int) -> float:
    """Best at 0.004 (adam) and 0.032 (dion), where dion is better by 0.1, 0.2 and 0.3."""
    best, floor = {"adam": (0.004, 3.0), "dion": (0.032, 3.0 - 0.1 * seed)}[optimizer]
    return floor + 0.1 * abs(math.log2(lr / best)) + 0.01 * seed


def flag(run: Run, name: str) -> str:
    return run.flags[run.flags.index(name) + 1]


class Laboratory:
    """Writes a study's file and makes up its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loss: Loss = parabola
        self.trained: list[Run] = []
        (folder / "common.args").write_text(f"--train-iters {STEPS} # few\n")

    def write(self, text: str = TEXT, name: str = "example") -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(text)
        return path

    def runs(self, text: str = TEXT, name: str = "example") -> StudyRuns:
        return StudyRuns(read_study(self.write(text, name)), self.folder / "pool")

    def trained_runs(self, text: str = TEXT) -> StudyRuns:
        runs = self.runs(text)
        runs.train(1, lambda line: None)
        return runs

    def execute(self, runs: Sequence[Run], jobs: int, report: Callable[[str], None]) -> None:
        for run in runs:
            self.trained.append(run)
            final = self.loss(
                flag(run, "--optimizer"), float(flag(run, "--lr")), int(flag(run, "--seed"))
            )
            step = {"grad_norm": 1.0, "iteration_seconds": 0.5}
            records = [
                {"kind": "train", "iteration": i, "lm_loss": final + 0.01 * (STEPS - i)}
                | {"tokens": 100 * i, "optimizer_seconds": 9.0 if i == 1 else 0.004, **step}
                for i in range(1, STEPS + 1)
            ]
            for i, loss in ((STEPS // 2, 9.0), (STEPS, final)):
                records.append({"kind": "validation", "iteration": i, "lm_loss": loss})
            records.append({"kind": "test", "iteration": STEPS, "lm_loss": 9.0})
            run.folder.mkdir(parents=True)
            run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
            run.mark_finished()

    def rates(self, optimizer: str, seed: int) -> list[float]:
        """Of all runs so far, in their order."""
        wanted = (optimizer, str(seed))
        of = [r for r in self.trained if (flag(r, "--optimizer"), flag(r, "--seed")) == wanted]
        return [float(flag(run, "--lr")) for run in of]


ONE_SETTING = "".join(line for line in TEXT.splitlines(True) if not line.startswith("axes"))


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    laboratory = Laboratory(tmp_path)
    monkeypatch.setattr(study_module, "execute", laboratory.execute)
    monkeypatch.setattr(command, "preload", lambda: None)
    return laboratory


def test_flags_of_a_run(laboratory: Laboratory) -> None:
    run = laboratory.runs().run("width 64", "New", "", 0.008, 2)
    expected = "--train-iters 48 --hidden-size 64 --optimizer dion --lr 0.008 --min-lr 0.0008"
    assert " ".join(run.flags) == f"{expected} --seed 2"
    assert run.name == "width 64, New, lr 0.008, seed 2"
    wide = laboratory.runs(TEXT.replace("lr: 0.008}", "lr: 0.008, processes: 2}"))
    on_two = wide.run("width 64", "New", "", 0.008, 2)
    assert (on_two.processes, on_two.flags) == (2, run.flags)
    assert on_two.folder != run.folder


def test_rates_double_until_the_best_lies_between_two_others(laboratory: Laboratory) -> None:
    runs = laboratory.trained_runs(ONE_SETTING)
    assert laboratory.rates("adam", seed=1) == [0.002, 0.004, 0.008]
    assert laboratory.rates("dion", seed=1) == [0.004, 0.008, 0.016, 0.032, 0.064]
    assert best_rate(runs.losses("", "New")) == 0.032
    for seed in (2, 3):
        assert laboratory.rates("adam", seed) == [0.004]
        assert laboratory.rates("dion", seed) == [0.032]


def test_a_sweep_ends_though_every_lower_rate_is_better(laboratory: Laboratory) -> None:
    """Rates that diverge are the worst; there are no more than eight."""
    laboratory.loss = lambda optimizer, lr, seed: 3 + lr if lr < 0.003 else math.nan
    runs = laboratory.trained_runs(ONE_SETTING)
    assert laboratory.rates("adam", seed=1) == [
        *(0.002, 0.004, 0.008),
        *(0.001, 0.0005, 0.00025, 0.000125, 6.25e-05),
    ]
    assert runs.losses("", "Base")[0.008] == {1: math.inf}
    assert not any(cell["is_bracketed"] for cell in runs.result()["cells"])


def test_given_rates_train_with_all_seeds(laboratory: Laboratory) -> None:
    runs = laboratory.trained_runs(ONE_SETTING + "rates: [1, 3]\n")
    assert laboratory.rates("adam", seed=3) == [0.004, 0.012]
    assert best_rate(runs.losses("", "New")) == 0.024


def test_the_best_variant_trains_with_all_seeds(laboratory: Laboratory) -> None:
    variants = "{slow: --optimizer dion, fast: --optimizer adam}"
    runs = laboratory.trained_runs(
        f"{ONE_SETTING}  # no more\n".replace(
            "{flags: --optimizer dion, lr: 0.008}", f"{{lr: 0.008, variants: {variants}}}"
        )
    )
    assert runs.best("", "New")[1:] == ("slow", 0.032)
    assert laboratory.rates("dion", seed=2) == [0.032]
    assert laboratory.rates("adam", seed=2) == [0.004]  # of the other method only
    row = next(line for line in to_markdown(runs.result()).splitlines() if "| New slow |" in line)
    assert "; fast 0.002: 3.110; fast 0.004: 3.010;" in row


def test_equal_runs_are_shared_and_an_interrupted_sweep_goes_on(laboratory: Laboratory) -> None:
    laboratory.trained_runs(ONE_SETTING)
    before = len(laboratory.trained)
    twice = TEXT.replace("  New:", "  Same: {flags: --optimizer adam, lr: 0.004}\n  New:")
    runs = laboratory.runs(twice, "another")  # its setting 128 has the flags of the first study
    runs.train(1, lambda line: None)
    assert len(laboratory.trained) == 2 * before
    folders = [run.folder for run in laboratory.trained]
    assert len(set(folders)) == len(folders)
    (folders[before] / "finished.json").unlink()
    pairs = [
        (setting, name) for setting in ("width 64", "width 128") for name in ("Base", "Same", "New")
    ]
    assert {run.folder for pair in pairs for run in runs.missing(*pair)} == {folders[before]}


def test_what_a_study_found(laboratory: Laboratory) -> None:
    result = laboratory.trained_runs().result()
    base, new = result["cells"][:2]
    assert (base["method"], base["best_lr"], base["gap"]) == ("Base", 0.004, None)
    assert base["loss"] == pytest.approx({"mean": 3.02, "sd": 0.01, "margin": 0.0248}, rel=1e-2)
    # Paired by seed: -0.1, -0.2, -0.3; Student's t with two degrees of freedom is 4.303.
    margin = 4.303 * 0.1 / math.sqrt(3)
    assert new["gap"] == pytest.approx({"mean": -0.2, "sd": 0.1, "margin": margin}, rel=1e-3)
    assert new["losses"][0.032] == pytest.approx({1: 2.91, 2: 2.82, 3: 2.73})
    assert list(new["losses"][0.064]) == [1]
    assert (new["steps"], new["tokens"]) == (STEPS, 100 * STEPS)
    assert (new["optimizer_seconds"], new["iteration_seconds"]) == (0.004, 0.5)
    assert new["curve"][STEPS] == pytest.approx(2.91 + 0.01 * 2)  # the mean of the last five


def test_estimates() -> None:
    assert estimate([1.0])["mean"] == 1.0
    assert math.isnan(estimate([1.0])["margin"])
    assert estimate([0.0] * 10 + [1.0])["margin"] == pytest.approx(2.228 / 11, rel=1e-2)
    assert math.isnan(estimate([1.0, math.nan, 2.0])["margin"])


def test_tables(laboratory: Laboratory) -> None:
    laboratory.loss = lambda optimizer, lr, seed: (
        math.nan
        if optimizer == "dion" and (seed == 2 or lr > 0.04)
        else parabola(optimizer, lr, seed)
    )
    result = laboratory.trained_runs().result()
    assert draw_study(result).axes  # with a method of which some runs diverged
    table = to_markdown(result)
    assert "## width 64\n\n48 steps, 4800 tokens, seeds 1, 2, 3.\n" in table
    base = (
        "| Base | 0.004 | 3.020 ± 0.010 |  | 4.0 | 500 | 0.002: 3.110; 0.004: 3.010; 0.008: 3.110 |"
    )
    assert base in table
    assert "| New | 0.032 | diverged | diverged | 4.0 | 500 | 0.004: 3.210; 0.008" in table
    read = json.loads(to_json(result))
    assert read["cells"][1]["losses"]["0.032"] == pytest.approx({"1": 2.91, "2": None, "3": 2.73})
    assert read["methods"]["New"]["flags"] == ["--optimizer", "dion"]


def test_command_writes_tables_and_a_picture(
    laboratory: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = laboratory.folder
    words = ["convergence", "sweep", str(laboratory.write()), "--pool", str(folder / "pool")]
    for _ in range(2):
        assert cli.call([*words, "--output", str(folder / "out")]) == 0
    assert len(laboratory.trained) == 2 * (3 + 5 + 2 + 2)
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert set(files) == {"example.json", "example.md", "example.png"}
    assert files["example.md"].decode() in capsys.readouterr().out
    assert len(files["example.png"]) > 10_000
