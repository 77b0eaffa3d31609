"""How a case's runs are trained and judged, with curves that nobody has trained."""

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_dion_tools.convergence import trainer as trainer_module
from megatron_dion_tools.convergence.case import Band, Below, Case, Control, Exact, RunSpec
from megatron_dion_tools.convergence.checks import Verdict
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.convergence.evaluation import (
    Outcome,
    evaluate,
    wanted_by_checks,
    wanted_by_golden,
)
from megatron_dion_tools.convergence.golden import Golden
from megatron_dion_tools.convergence.trainer import Trainer, Wanted
from megatron_dion_tools.local.runs import Run

SEEDS = (3, 4, 5)
LENGTH = 60
BOTH = ("lm_loss", "grad_norm")
ENVIRONMENT = {"torch": "2.9.0", "processor": "EPYC", "data": "abc", "tokenizer": "def"}
ELSEWHERE = {**ENVIRONMENT, "processor": "Xeon"}

ONE = RunSpec("one", ("--lr", "2e-3"))
TWO = RunSpec("two", (), processes=2)
RESUMED = RunSpec("resumed", ("--sequence-parallel",), continues="one", at=30)
WRONG = RunSpec("wrong", ("--seed", "9"), patch="mistakes:make")


def case(
    runs: Sequence[RunSpec] = (ONE, TWO, RESUMED),
    golden: Sequence[str] = ("one",),
    checks: Sequence[Any] = (),
    controls: Sequence[Control] = (),
) -> Case:
    return Case(
        name="small",
        description="",
        flags=("--num-layers", "2", "--lr", "1e-3"),
        vocab_size=None,
        seeds=SEEDS,
        short=True,
        runs={run.name: run for run in runs},
        golden=tuple(golden),
        checks=tuple(checks),
        controls=tuple(controls),
    )


def control(*kinds: str, run: RunSpec = WRONG, reference: str = "one") -> Control:
    made: dict[str, Any] = {
        "exact": Exact(run.name, reference, BOTH),
        "band": Band(run.name, reference, 0.1, BOTH),
    }
    return Control(run, tuple(made[kind] for kind in kinds))


Batches = list[list[Run]]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """What was trained together, by an executor that trains nothing."""
    seen: Batches = []

    def execute(runs: Sequence[Run], jobs: int, report: Callable[[str], None]) -> None:
        assert jobs == 2
        assert not any(run.folder.exists() for run in runs)
        seen.append(list(runs))

    monkeypatch.setattr(trainer_module, "execute", execute)
    return seen


def train(of: Case, folder: Path, wanted: list[Wanted]) -> None:
    Trainer(of, folder, ["--data", "x"]).train(wanted, 2, print)


def flags_by_name(batches: Batches) -> dict[str, str]:
    return {run.name: " ".join(run.flags) for batch in batches for run in batch}


def test_a_run_has_its_own_flags_last_and_a_folder_for_each_seed(
    batches: Batches, tmp_path: Path
) -> None:
    train(case([ONE, TWO]), tmp_path, [(ONE, 3), (ONE, 4), (TWO, 3)])
    common = "--num-layers 2 --lr"
    assert flags_by_name(batches) == {
        "one, seed 3": f"{common} 2e-3 --seed 3 --data x",
        "one, seed 4": f"{common} 2e-3 --seed 4 --data x",
        "two, seed 3": f"{common} 1e-3 --seed 3 --data x",
    }
    runs = [run for batch in batches for run in batch]
    assert [run.processes for run in runs] == [1, 1, 2]
    assert [run.folder for run in runs] == [
        tmp_path / "one" / "seed-3",
        tmp_path / "one" / "seed-4",
        tmp_path / "two" / "seed-3",
    ]


def test_a_mistake_may_be_a_seed_or_a_patch(batches: Batches, tmp_path: Path) -> None:
    train(case(controls=[control("exact")]), tmp_path, [(WRONG, 3)])
    [run] = batches[0]
    assert run.patch == "mistakes:make"
    assert run.folder == tmp_path / "wrong" / "seed-3"
    assert " ".join(run.flags) == "--num-layers 2 --lr 1e-3 --seed 9 --data x"


def test_runs_load_what_those_that_they_continue_save(batches: Batches, tmp_path: Path) -> None:
    train(case(), tmp_path, [(RESUMED, 4), (ONE, 4), (TWO, 4)])
    found = flags_by_name(batches)
    checkpoints = tmp_path / "one" / "seed-4" / "checkpoints"
    assert found["one, seed 4"].endswith(f" --save {checkpoints} --save-interval 30")
    assert found["resumed, seed 4"].endswith(f" --load {checkpoints} --ckpt-step 30")
    assert "--save" not in found["resumed, seed 4"] + found["two, seed 4"]
    assert "--load" not in found["one, seed 4"] + found["two, seed 4"]


def test_a_run_saves_at_every_iteration_that_others_need(batches: Batches, tmp_path: Path) -> None:
    later = dataclasses.replace(RESUMED, name="later", at=45)
    train(case([ONE, RESUMED, later]), tmp_path, [(ONE, 3)])
    assert flags_by_name(batches)["one, seed 3"].endswith("--save-interval 15")


def test_runs_that_continue_others_are_trained_after_them(batches: Batches, tmp_path: Path) -> None:
    train(case(), tmp_path, [(RESUMED, 3), (TWO, 3), (ONE, 3), (ONE, 3)])
    assert [[run.name for run in batch] for batch in batches] == [
        ["one, seed 3", "two, seed 3"],
        ["resumed, seed 3"],
    ]


def test_what_others_continue_is_trained_unasked_with_the_same_seed(
    batches: Batches, tmp_path: Path
) -> None:
    train(case(), tmp_path, [(RESUMED, 4), (ONE, 3)])
    assert [[run.name for run in batch] for batch in batches] == [
        ["one, seed 4", "one, seed 3"],
        ["resumed, seed 4"],
    ]


def test_a_mistake_in_a_run_that_continues_another_waits_for_it(
    batches: Batches, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(RESUMED, name="wrong")
    of = case(controls=[control("exact", run=wrong, reference="resumed")])
    train(of, tmp_path, [(wrong, 3)])
    assert [[run.name for run in batch] for batch in batches] == [
        ["one, seed 3"],
        ["wrong, seed 3"],
    ]
    checkpoints = tmp_path / "one" / "seed-3" / "checkpoints"
    assert f"--load {checkpoints} --ckpt-step 30" in flags_by_name(batches)["wrong, seed 3"]


def test_everything_is_trained_from_the_beginning(batches: Batches, tmp_path: Path) -> None:
    old = [tmp_path / name / "seed-3" for name in ("one", "resumed", "two")]
    for folder in old:
        folder.mkdir(parents=True)
        (folder / "finished.json").write_text("{}")
    train(case(), tmp_path, [(RESUMED, 3)])  # and nothing of what is not trained now
    assert [folder.exists() for folder in old] == [False, False, False]


def test_commands_are_the_same_on_every_machine(tmp_path: Path) -> None:
    trainer = Trainer(case(), tmp_path, ["--data", "x"])
    common = "--num-layers 2 --lr"
    assert trainer.command(ONE) == f"{common} 2e-3"
    assert trainer.command(TWO) == f"{common} 1e-3"
    assert trainer.command(RESUMED) == f"{common} 1e-3 --sequence-parallel"


def test_checks_want_golden_runs_and_those_they_compare() -> None:
    below = Below("two", "one", 60, BOTH)
    of = case(checks=[Exact("resumed", "one", BOTH)], controls=[control("exact")])
    assert wanted_by_checks(of, with_controls=False) == [(ONE, 3), (RESUMED, 3)]
    assert wanted_by_checks(of, with_controls=True) == [(ONE, 3), (RESUMED, 3), (WRONG, 3)]
    assert wanted_by_checks(case(checks=[below]), with_controls=False) == [
        *((ONE, seed) for seed in SEEDS),
        *((TWO, seed) for seed in SEEDS),
    ]
    assert wanted_by_golden(of) == [(ONE, seed) for seed in SEEDS]


def test_controls_want_the_runs_that_they_spoil() -> None:
    of = case(controls=[control("exact", reference="two")])
    assert wanted_by_checks(of, with_controls=False) == [(ONE, 3)]
    assert wanted_by_checks(of, with_controls=True) == [(ONE, 3), (TWO, 3), (WRONG, 3)]


Values = dict[str, list[float]]


def numbers(seed: int) -> Values:
    """The loss and the gradient norm of a good run."""
    chance = random.Random(seed)
    shift = chance.gauss(0, 0.05)
    return {
        "lm_loss": [7 - i / 20 + shift + chance.gauss(0, 0.1) for i in range(LENGTH)],
        "grad_norm": [1 + shift + chance.gauss(0, 0.1) for _ in range(LENGTH)],
    }


def changed(values: Values, quantity: str, change: Callable[[int, float], float]) -> Values:
    """Numbers of which one quantity is another, by iteration and value."""
    made = [change(i, value) for i, value in enumerate(values[quantity], start=1)]
    return {**values, quantity: made}


class Trained:
    """A folder of runs, all of them good until something else is written there."""

    def __init__(self, folder: Path, of: Case) -> None:
        self.trainer = Trainer(of, folder, ())
        for run in (*of.runs.values(), *(one.run for one in of.controls)):
            for seed in of.seeds:
                self.write(run, seed, numbers(seed))
        self.golden = Golden(
            ENVIRONMENT,
            {name: self.trainer.command(of.runs[name]) for name in of.golden},
            {
                name: {seed: self.trainer.curves(of.runs[name], seed) for seed in of.seeds}
                for name in of.golden
            },
        )

    def write(self, run: RunSpec, seed: int, values: Values, first: int | None = None) -> None:
        first = first or (run.at or 0) + 1
        folder = self.trainer.folder / run.name / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"kind": "train", "iteration": i + 1, **{name: values[name][i] for name in values}}
            for i in range(first - 1, LENGTH)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.trainer._run(run, seed).mark_finished()

    def judge(
        self, environment: dict[str, str] = ENVIRONMENT, with_controls: bool = False
    ) -> Outcome:
        return evaluate(self.trainer, self.golden, environment, with_controls)


def failed(verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    return [(one.check, one.quantity) for one in verdicts if not one.passed]


def next_number(_: int, value: float) -> float:
    return math.nextafter(value, math.inf)


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(
        tmp_path,
        case(
            checks=[
                Exact("resumed", "one", BOTH),
                Band("two", "one", 0.1, ("lm_loss",)),
                Below("two", "one", 60, ("grad_norm",)),
            ],
            controls=[control("exact", "band")],
        ),
    )


def test_runs_of_other_flags_are_not_judged(tmp_path: Path) -> None:
    trained = Trained(tmp_path, case())
    (tmp_path / "one" / "seed-3" / "finished.json").write_text("{}")
    with pytest.raises(ConvergenceError, match="one, seed 3 was not trained to its end with"):
        trained.judge()


def test_golden_curves_of_other_flags_are_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path, case())
    before = {"one": "--lr 7"}
    trained.golden = dataclasses.replace(trained.golden, commands=before)
    with pytest.raises(ConvergenceError, match=r"one were made with other flags.*'--lr 7'"):
        trained.judge()


def test_every_check_has_a_verdict_for_each_quantity(trained: Trained) -> None:
    for seed in SEEDS:
        trained.write(TWO, seed, changed(numbers(seed), "grad_norm", lambda _, x: x - 0.5))
    outcome = trained.judge()
    assert [(one.check, one.quantity) for one in outcome.verdicts] == [
        ("one, seed 3 repeats one, seed 3", "lm_loss"),
        ("one, seed 3 repeats one, seed 3", "grad_norm"),
        ("resumed, seed 3 repeats one, seed 3", "lm_loss"),
        ("resumed, seed 3 repeats one, seed 3", "grad_norm"),
        ("two, seed 3 follows one, seed 3 within 0.1 of the seed noise", "lm_loss"),
        ("two is below one at iteration 60", "grad_norm"),
    ]
    assert failed(outcome.verdicts) == []
    assert outcome.controls == []
    assert outcome.passed


def test_a_failed_check_is_an_outcome_that_failed(trained: Trained) -> None:
    outcome = trained.judge()
    assert failed(outcome.verdicts) == [("two is below one at iteration 60", "grad_norm")]
    assert not outcome.passed


@pytest.mark.parametrize("quantity", BOTH)
def test_where_golden_curves_were_made_every_bit_counts(tmp_path: Path, quantity: str) -> None:
    trained = Trained(tmp_path, case())
    assert trained.judge().passed
    trained.write(ONE, 3, changed(numbers(3), quantity, next_number))
    [verdict] = [one for one in trained.judge().verdicts if not one.passed]
    assert verdict.quantity == quantity
    assert verdict.divergent == 1


@pytest.mark.parametrize("quantity", BOTH)
def test_elsewhere_golden_curves_have_a_band(tmp_path: Path, quantity: str) -> None:
    trained = Trained(tmp_path, case())
    trained.write(ONE, 3, changed(numbers(3), quantity, next_number))
    outcome = trained.judge(ELSEWHERE)
    assert outcome.passed
    assert all("within 0.1 of the seed noise" in one.check for one in outcome.verdicts)
    trained.write(ONE, 3, changed(numbers(3), quantity, lambda i, x: x + 0.1 * (i > 20)))
    [verdict] = [one for one in trained.judge(ELSEWHERE).verdicts if not one.passed]
    assert verdict.quantity == quantity
    assert verdict.divergent is not None
    assert verdict.divergent > 20


@pytest.mark.parametrize(("name", "value"), [("data", "xyz"), ("tokenizer", "xyz")])
def test_other_data_is_refused(tmp_path: Path, name: str, value: str) -> None:
    message = f"small: the golden curves were made with other {name}: prepare the same"
    with pytest.raises(ConvergenceError, match=message):
        Trained(tmp_path, case()).judge({**ENVIRONMENT, name: value})


def test_a_run_that_lost_its_beginning_does_not_repeat_golden_curves(tmp_path: Path) -> None:
    trained = Trained(tmp_path, case())
    trained.write(ONE, 3, numbers(3), first=2)
    for environment in (ENVIRONMENT, ELSEWHERE):
        assert [one.divergent for one in trained.judge(environment).verdicts] == [1, 1]


@pytest.mark.parametrize(("first", "divergent"), [(1, 1), (30, 30), (32, 31)])
def test_a_run_that_continues_another_starts_at_its_checkpoint(
    trained: Trained, first: int, divergent: int
) -> None:
    trained.write(RESUMED, 3, numbers(3), first=first)
    found = [one for one in trained.judge().verdicts if one.check.startswith("resumed")]
    assert [(one.passed, one.divergent) for one in found] == [(False, divergent)] * 2


def test_a_mistake_that_is_noticed_passes(tmp_path: Path) -> None:
    trained = Trained(tmp_path, case(controls=[control("exact", "band")]))
    trained.write(WRONG, 3, changed(numbers(3), "grad_norm", lambda _, x: x + 1))
    outcome = trained.judge(with_controls=True)
    assert outcome.passed
    assert failed(outcome.controls) == [
        ("wrong, seed 3 repeats one, seed 3", "grad_norm"),
        ("wrong, seed 3 follows one, seed 3 within 0.1 of the seed noise", "grad_norm"),
    ]
    assert failed(trained.judge().controls) == []


def test_a_mistake_must_be_noticed_by_each_of_its_checks(tmp_path: Path) -> None:
    trained = Trained(tmp_path, case(controls=[control("exact", "band")]))
    trained.write(WRONG, 3, changed(numbers(3), "lm_loss", next_number))
    outcome = trained.judge(with_controls=True)
    assert [one.passed for one in outcome.controls] == [False, True]
    assert failed(outcome.verdicts) == []
    assert not outcome.passed


def test_golden_curves_that_are_missing_are_named(tmp_path: Path) -> None:
    trained = Trained(tmp_path, case())
    trained.golden = dataclasses.replace(trained.golden, curves={})
    with pytest.raises(
        ConvergenceError, match="small: there are no golden curves of one: `update`"
    ):
        trained.judge()


def test_runs_that_are_not_trained_are_named(tmp_path: Path) -> None:
    trained = Trained(tmp_path, case())
    (tmp_path / "one" / "seed-3" / "metrics.jsonl").unlink()
    with pytest.raises(ConvergenceError, match=r"one/seed-3: neither a metrics\.jsonl"):
        trained.judge()
