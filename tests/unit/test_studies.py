import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_dion_tools import cli
from megatron_dion_tools.data.prepared import Data
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.runs import Run
from megatron_dion_tools.studies import command as tool
from megatron_dion_tools.studies import results as results_module
from megatron_dion_tools.studies import study as study_module
from megatron_dion_tools.studies.pictures import draw_all
from megatron_dion_tools.studies.results import (
    StudyUnfinished,
    collect,
    paired_differences,
    spread,
    steps_to_loss,
    to_json,
    trailing_means,
)
from megatron_dion_tools.studies.study import (
    Cell,
    FileError,
    Study,
    Trial,
    Trials,
    conduct,
    read_study,
)
from megatron_dion_tools.studies.tables import page

ROOT = Path(__file__).parents[2]
STEPS = 48
TEXT = """
question: Which is better?
arguments: common.args
vocab_size: 512
axis: width
settings: {"64": --hidden-size 64, "128": ""}
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


class Laboratory:
    """Writes a study's file and makes up its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loss: Loss = parabola
        self.executed: list[Run] = []
        (folder / "common.args").write_text(f"--train-iters {STEPS} # few\n")

    def study(self, text: str = TEXT) -> Study:
        (self.folder / "example.yaml").write_text(text)
        return read_study(self.folder / "example.yaml")

    def trials(self, text: str = TEXT) -> Trials:
        return Trials(self.study(text), self.folder / "pool", ["--data", "here"])

    def conducted(self, text: str = TEXT) -> Trials:
        trials = self.trials(text)
        conduct(trials, 1, lambda line: None)
        return trials

    def execute(self, runs: Sequence[Run], jobs: int, report: Callable[[str], None]) -> None:
        for run in runs:
            self.executed.append(run)
            run.folder.mkdir(parents=True)
            lines = [json.dumps(record) + "\n" for record in self.records(run)]
            run.metrics.write_text("".join(lines))
            software = {"git_revision": "abc", "platform": "cpu", "versions": {"torch": "2"}}
            (run.folder / "config.json").write_text(json.dumps(software))
            run.mark_finished()

    def records(self, run: Run) -> list[dict[str, Any]]:
        """Loss falls by 0.01 per step to what `loss` tells."""
        final = self.loss(value(run, "--optimizer"), rate(run), int(value(run, "--seed")))
        training = [
            {"kind": "train", "iteration": i, "lm_loss": final + 0.01 * (STEPS - i)}
            | {"grad_norm": 1.0, "tokens": 100 * i, "iteration_seconds": 0.5}
            | {"optimizer_seconds": 9.0 if i == 1 else 0.004}
            for i in range(1, STEPS + 1)
        ]
        halves = [
            {"kind": "validation", "iteration": i, "lm_loss": final + 0.01 * (STEPS - i)}
            for i in (STEPS // 2, STEPS)
        ]
        return [*training, *halves, {"kind": "test", "iteration": STEPS, "lm_loss": 9.0}]

    def rates(self, optimizer: str, seed: int) -> list[float]:
        """Of all runs so far, in their order."""
        wanted = (optimizer, str(seed))
        runs = self.executed
        return [rate(r) for r in runs if (value(r, "--optimizer"), value(r, "--seed")) == wanted]


def value(run: Run, flag: str) -> str:
    return run.flags[run.flags.index(flag) + 1]


def rate(run: Run) -> float:
    return float(value(run, "--lr"))


def one_setting(text: str = TEXT) -> str:
    return "".join(line for line in text.splitlines(True) if not line.startswith("settings"))


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    laboratory = Laboratory(tmp_path)
    monkeypatch.setattr(study_module, "execute", laboratory.execute)
    return laboratory


# Reading


def test_study_is_read(laboratory: Laboratory) -> None:
    study = laboratory.study()
    assert study.name == "example"
    assert study.common == ("--train-iters", "48")
    assert study.settings == {"64": ("--hidden-size", "64"), "128": ()}
    assert study.methods["New"].flags == ("--optimizer", "dion")
    assert study.methods["New"].lr == 0.008
    assert study.seeds == (1, 2, 3)
    assert study.rates == ()
    assert study.baseline == "Base"
    assert study.panels == {"": ("Base", "New")}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("question:", "questoin:"), "unknown keys.*questoin.*there are.*question"),
        (("seeds: [1, 2, 3]", ""), "no key 'seeds'"),
        (("lr: 0.008", "rate: 0.008"), "no key 'lr'"),
        (("baseline: Base", "baseline: Basis"), "no methods.*Basis"),
        (("baseline: Base", "panels: {all: [Base, Old]}"), "no methods.*Old"),
        (('"128"', "wide"), "settings .*wide.* are no numbers"),
    ],
)
def test_mistake_in_a_study_is_named(
    laboratory: Laboratory, change: tuple[str, str], complaint: str
) -> None:
    with pytest.raises(FileError, match=f"example.yaml: {complaint}"):
        laboratory.study(TEXT.replace(*change))


@pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*.yaml")), ids=lambda path: path.stem)
def test_studies_of_the_project_are_read(path: Path) -> None:
    study = read_study(path)
    in_panels = {name for names in study.panels.values() for name in names}
    assert in_panels == set(study.methods)


# Learning rates


def test_flags_of_a_run(laboratory: Laboratory) -> None:
    run = laboratory.trials().run(Trial(Cell("64", "New"), 0.008, 2))
    expected = "--train-iters 48 --hidden-size 64 --optimizer dion --lr 0.008 --min-lr 0.0008"
    assert " ".join(run.flags) == f"{expected} --seed 2 --data here"
    assert run.name == "64, New, lr 0.008, seed 2"


def test_sweep_goes_on_until_the_best_rate_lies_between_two_others(laboratory: Laboratory) -> None:
    trials = laboratory.conducted(one_setting())
    assert laboratory.rates("adam", seed=1) == [0.002, 0.004, 0.008]
    assert laboratory.rates("dion", seed=1) == [0.004, 0.008, 0.016, 0.032, 0.064]
    assert trials.best_rate(Cell("", "New")) == 0.032


def test_sweep_goes_down_past_rates_that_diverge(laboratory: Laboratory) -> None:
    laboratory.loss = lambda optimizer, lr, seed: 3 + lr if lr < 0.003 else math.nan
    laboratory.conducted(one_setting())
    first = [0.002, 0.004, 0.008]
    assert laboratory.rates("adam", seed=1) == [*first, 0.001, 0.0005, 0.00025, 0.000125, 6.25e-05]


def test_other_seeds_run_at_the_best_rate_only(laboratory: Laboratory) -> None:
    laboratory.conducted(one_setting())
    assert [laboratory.rates("dion", seed) for seed in (2, 3)] == [[0.032], [0.032]]


def test_given_rates_are_run_with_all_seeds(laboratory: Laboratory) -> None:
    laboratory.conducted(one_setting(TEXT + "rates: [0.5, 1]\n"))
    assert [laboratory.rates("dion", seed) for seed in (1, 2, 3)] == [[0.004, 0.008]] * 3


def test_finished_runs_are_not_repeated(laboratory: Laboratory) -> None:
    trials = laboratory.conducted()
    done = len(laboratory.executed)
    conduct(trials, 1, lambda line: None)
    assert len(laboratory.executed) == done


def test_studies_share_runs_with_the_same_flags(laboratory: Laboratory) -> None:
    laboratory.conducted()
    done = len(laboratory.executed)
    laboratory.conducted(TEXT.replace('"128"', '"256"').replace("Base", "Old"))
    assert len(laboratory.executed) == done


@pytest.mark.parametrize("last", [None, math.nan])
def test_loss_of_a_diverged_run_is_infinite(laboratory: Laboratory, last: float | None) -> None:
    trials = laboratory.conducted(one_setting())
    trial = Trial(Cell("", "Base"), 0.004, 1)
    assert trials.loss(trial) == pytest.approx(3.01)
    with trials.run(trial).metrics.open("a") as file:
        file.write(json.dumps({"kind": "validation", "iteration": 49, "lm_loss": last}) + "\n")
    assert trials.loss(trial) == math.inf


# Numbers


def test_trailing_means_begin_with_a_full_window() -> None:
    assert trailing_means(range(18)) == [7.5, 8.5, 9.5]


FALLING = [float(20 - step) for step in range(1, 21)]  # trailing means: 11.5 at step 16 to 7.5


@pytest.mark.parametrize(
    ("losses", "target", "step"),
    [
        (FALLING, 9.5, 18),
        (FALLING, 9.4, 19),
        (FALLING, 7.5, 20),
        (FALLING, 7.4, None),
        (FALLING, 99.0, 16),
        (FALLING, math.nan, None),
        ([1.0] * 17 + [2.0] * 16 + [1.0] * 16, 1.0, 49),  # below at first, too
        ([1.0] * 19 + [math.nan], 5.0, None),
    ],
)
def test_steps_to_a_loss(losses: list[float], target: float, step: int | None) -> None:
    assert steps_to_loss(losses, target) == step


def test_spread_of_samples() -> None:
    assert spread([1.0, 2.0, 3.0]) == results_module.Spread(2.0, 1.0)
    assert spread([2.0]).mean == 2.0
    assert math.isnan(spread([2.0]).sd)
    assert spread([1.0, math.inf]).mean == math.inf
    assert math.isnan(spread([1.0, None]).mean)


def test_difference_to_a_diverged_run_is_not_a_number() -> None:
    differences = paired_differences(
        {1: 3.0, 2: math.inf, 3: math.inf}, {1: 4.0, 2: math.inf, 3: 3.5}
    )
    assert differences[1] == -1.0
    assert math.isnan(differences[2])
    assert math.isnan(differences[3])


# Results


def test_result_of_a_cell(laboratory: Laboratory) -> None:
    cell = collect(laboratory.conducted(), {}).cell("64", "New")
    assert cell.best_lr == 0.032
    assert cell.is_bracketed
    assert [rate.lr for rate in cell.rates] == [0.004, 0.008, 0.016, 0.032, 0.064]
    assert [len(rate.validation_loss) for rate in cell.rates] == [1, 1, 1, 3, 1]
    assert cell.rates[0].validation_loss[1] == pytest.approx(2.91 + 0.3)
    assert cell.validation_losses == pytest.approx({1: 2.91, 2: 2.82, 3: 2.73})
    assert (cell.validation_loss.mean, cell.validation_loss.sd) == pytest.approx((2.82, 0.09))
    assert (cell.steps, cell.tokens) == (48, 4800)
    assert (cell.optimizer_seconds, cell.iteration_seconds) == (0.004, 0.5)


def test_curves_are_smoothed_and_thinned(laboratory: Laboratory) -> None:
    curve = collect(laboratory.conducted(), {}).cell("64", "Base").curves[2]
    assert curve.iterations == (16, 24, 32, 40, 48)
    # The mean of the last 16 steps is that of 7.5 steps ago.
    expected = [3.02 + 0.01 * (STEPS - i + 7.5) for i in curve.iterations]
    assert curve.loss == pytest.approx(expected)
    assert curve.grad_norm == (1.0,) * 5
    assert curve.validation_iterations == (24, 48)
    assert curve.validation_loss == pytest.approx((3.26, 3.02))


def test_comparison_with_the_baseline_is_by_seed(laboratory: Laboratory) -> None:
    result = collect(laboratory.conducted(), {})
    comparison = result.cell("64", "New").comparison
    assert comparison is not None
    assert comparison.differences == pytest.approx({1: -0.1, 2: -0.2, 3: -0.3})
    assert comparison.difference.mean == pytest.approx(-0.2)
    assert comparison.margin == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    # 0.01 per step, counted from the first step at or below: rounding may ask for one more.
    steps = {seed: 48 * (share or 0) for seed, share in comparison.step_shares.items()}
    assert steps == pytest.approx({1: 38, 2: 28, 3: 18}, abs=1.01)
    assert result.cell("64", "Base").comparison is None


def test_without_a_baseline_nothing_is_compared(laboratory: Laboratory) -> None:
    result = collect(laboratory.conducted(TEXT.replace("baseline: Base", "")), {})
    assert all(cell.comparison is None for cell in result.cells)
    assert result.reference == "Base"
    assert "minus" not in page(result)


def test_rate_at_the_end_of_the_range_is_not_bracketed(laboratory: Laboratory) -> None:
    laboratory.loss = lambda optimizer, lr, seed: 3 - lr
    result = collect(laboratory.conducted(one_setting()), {})
    assert len(result.cell("", "Base").rates) == 8
    assert not result.cell("", "Base").is_bracketed
    assert "| Base | 0.256\\* | 2.744" in page(result)


def test_unfinished_study_is_refused_with_what_is_missing(laboratory: Laboratory) -> None:
    trials = laboratory.conducted()
    (trials.run(Trial(Cell("64", "New"), 0.032, 3)).folder / "finished.json").unlink()
    with pytest.raises(StudyUnfinished) as error:
        collect(trials, {})
    assert str(error.value).splitlines() == [
        "example is not finished: 1 of 4 cells need runs, and perhaps more after them",
        "  64, New: lr 0.032 seed 3",
    ]


def test_json_is_reproducible_and_has_null_for_diverged(laboratory: Laboratory) -> None:
    laboratory.loss = lambda *of_run: math.nan if of_run[1] > 0.03 else parabola(*of_run)
    trials = laboratory.conducted()
    text = to_json(collect(trials, {"cpu": "some"}))
    assert text == to_json(collect(trials, {"cpu": "some"}))
    content = json.loads(text)
    assert content["environment"]["cpu"] == "some"
    assert content["environment"]["git_revision"] == "abc"
    [cell] = [c for c in content["cells"] if (c["setting"], c["method"]) == ("64", "New")]
    by_rate = {rate["lr"]: rate["validation_loss"]["1"] for rate in cell["rates"]}
    assert by_rate[0.032] is None
    assert by_rate[0.016] == pytest.approx(3.01)
    assert cell["validation_losses"]["2"] == parabola("dion", 0.016, 2)


def test_environment_lists_what_differs_between_runs(laboratory: Laboratory) -> None:
    trials = laboratory.conducted()
    config = trials.run(Trial(Cell("64", "New"), 0.032, 3)).folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"git_revision": "def"}))
    environment = collect(trials, {}).environment
    assert environment["git_revision"] == ["abc", "def"]
    assert environment["versions"] == {"torch": "2"}


# Tables and pictures


def test_table_has_loss_difference_and_steps(laboratory: Laboratory) -> None:
    text = page(collect(laboratory.conducted(), {}))
    assert "## width 64\n\n48 steps, 4800 tokens, seeds 1, 2, 3.\n" in text
    assert "| Base | 0.004 | 3.020 ± 0.010 |  |  | 4.0 | 500 |" in text
    assert "| New | 0.032 | 2.820 ± 0.090 | -0.200 ± 0.248 | " in text
    assert "| 0.004: 3.210; 0.008: 3.110; 0.016: 3.010; 0.032: 2.910; 0.064: 3.010 |" in text


def better_with(seeds: set[int]) -> Loss:
    return lambda optimizer, lr, seed: (
        parabola("adam", lr, seed) + (0 if optimizer == "adam" else -0.1 if seed in seeds else 0.1)
    )


@pytest.mark.parametrize(
    ("seeds", "told"),
    [({1, 2}, "reached by 2 of 3 seeds"), (set[int](), "never"), ({1, 2, 3}, "% ± ")],
)
def test_table_tells_how_many_seeds_reach_the_baseline(
    laboratory: Laboratory, seeds: set[int], told: str
) -> None:
    laboratory.loss = better_with(seeds)
    text = page(collect(laboratory.conducted(one_setting()), {}))
    [row] = [line for line in text.splitlines() if line.startswith("| New |")]
    assert told in row


def test_table_tells_what_diverged(laboratory: Laboratory) -> None:
    laboratory.loss = diverged_with_seed_3
    text = page(collect(laboratory.conducted(one_setting()), {}))
    assert "| New | 0.032 | diverged | diverged | reached by 2 of 3 seeds |" in text


def diverged_with_seed_3(optimizer: str, lr: float, seed: int) -> float:
    return math.nan if (optimizer, seed) == ("dion", 3) else parabola(optimizer, lr, seed)


@pytest.mark.parametrize("loss", [parabola, diverged_with_seed_3], ids=["finite", "diverged"])
def test_pictures_are_drawn(laboratory: Laboratory, loss: Loss) -> None:
    laboratory.loss = loss
    drawn = draw_all(collect(laboratory.conducted(), {}), laboratory.folder)
    assert [path.name for path in drawn] == [
        f"example_{kind}.png" for kind in ("curves", "rates", "gaps")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


# The command line


@pytest.fixture
def at_home(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """The tool, with the laboratory's data."""
    monkeypatch.setattr(tool, "data_with_vocabulary", lambda size: Data(laboratory.folder, size))
    for file in ("tokenizer.model", "train_text_document.bin", "train_text_document.idx"):
        (laboratory.folder / file).write_text(file)
    for slow in ("prepare", "preload"):
        monkeypatch.setattr(tool, slow, lambda *_: None)
    laboratory.study()
    return laboratory


def call(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, action: str, *argv: str) -> None:
    folder = laboratory.folder
    where = ["--pool", str(folder / "pool"), *argv]
    cli.call(["study", action, str(folder / "example.yaml"), *where])


def test_run_and_report(
    at_home: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, images = at_home.folder / "new" / "results", at_home.folder / "images"
    to = ("--results", str(results), "--images", str(images))
    with pytest.raises(ToolError, match="example is not finished: 4 of 4 cells"):
        call(at_home, monkeypatch, "report", *to)
    assert not results.exists()

    call(at_home, monkeypatch, "run", "--jobs", "1")
    assert "example: 12 runs" in capsys.readouterr().out

    call(at_home, monkeypatch, "report", *to)
    assert capsys.readouterr().out.strip() == (results / "example.md").read_text().strip()
    content = json.loads((results / "example.json").read_text())
    assert len(content["environment"]["tokenizer"]) == 64
    assert content["commands"][0] == ".venv/bin/megatron-dion study run studies/example.yaml"
    assert len(list(images.iterdir())) == 3


@pytest.mark.parametrize(("text", "message"), [("", "is not a mapping"), ("{", "not yaml")])
def test_file_that_is_no_study_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(FileError, match=message):
        read_study(tmp_path / "broken.yaml")


def test_mistake_in_a_study_is_told_in_one_line(
    at_home: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (at_home.folder / "example.yaml").write_text(TEXT + "sedes: [1]\n")
    with pytest.raises(ToolError, match="unknown keys"):
        call(at_home, monkeypatch, "run")


TINY = """
question: Do the commands train?
arguments: tiny.args
vocab_size: 1024
methods:
  AdamW: {flags: --optimizer adam, lr: 0.004}
  Dion: {flags: --optimizer dion --use-distributed-optimizer, lr: 0.008}
baseline: AdamW
seeds: [1]
rates: [1]
"""
TINY_MODEL = f"""
--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8
--micro-batch-size 1 --global-batch-size 1 --train-iters {results_module.SMOOTHED_OVER + 1}
--eval-interval 10 --eval-iters 1
"""


def test_commands_train_and_report(tmp_path: Path) -> None:
    """Nothing made up, and nothing of the project's own pages written."""
    (tmp_path / "tiny.args").write_text(TINY_MODEL)
    (tmp_path / "tiny.yaml").write_text(TINY)
    study, pool = str(tmp_path / "tiny.yaml"), ("--pool", str(tmp_path / "pool"))
    results, images = tmp_path / "results", tmp_path / "images"
    said = megatron_dion("study", "run", study, *pool)
    assert "tiny: 2 runs" in said
    where = ("--results", str(results), "--images", str(images))
    assert "| Dion | 0.008" in megatron_dion("study", "report", study, *pool, *where)
    assert {path.name for path in results.iterdir()} == {"tiny.json", "tiny.md"}
    assert any(images.iterdir())


def megatron_dion(*words: str) -> str:
    """What a command says, in the project's folder, where the corpus is."""
    command = [sys.executable, "-m", "megatron_dion", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
