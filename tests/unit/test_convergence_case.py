"""What a case's file may say; the cases themselves are in tests/convergence."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dion_tools.convergence.case import (
    Band,
    Below,
    Case,
    Control,
    Exact,
    RunSpec,
    read_case,
)
from megatron_dion_tools.convergence.errors import ConvergenceError

BOTH = ("lm_loss", "grad_norm")
SMALL: dict[str, Any] = {
    "description": "a small case",
    "arguments": "tiny.args",
    "seeds": [1, 2, 3],
    "runs": {"one": {}, "two": {"processes": 2}, "resumed": {"continues": "one", "at": 30}},
    "golden": ["one"],
    "checks": [{"exact": {"run": "resumed", "reference": "one"}}],
    "controls": {"wrong": {"instead_of": "one", "noticed_by": ["exact", "band"]}},
}
LARGE = """
description: >
  Words on
  two lines.
arguments: tiny.args
flags: --optimizer dion --lr 2e-3
vocab_size: 1024
seeds: [1, 2]
short: true
runs:
  one: {}
  two:
    processes: 2
    flags: --tensor-model-parallel-size 2 --name 'a b'
  resumed:
    continues: one
    at: 30
golden: [one, two]
checks:
  - exact: {run: resumed, reference: one, quantities: [lr]}
  - band: {run: two, reference: one}
  - band: {run: two, reference: one, share: 0.5, quantities: [validation_loss]}
  - below: {run: one, reference: two, at: 60}
controls:
  frozen:
    instead_of: resumed
    patch: mistakes.py:freeze
    noticed_by: [exact]
  fast:
    instead_of: two
    flags: --lr 1
    noticed_by: [exact, band]
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Case]:
    """Reads a case of the given content, text or not."""
    (tmp_path / "tiny.args").write_text("--num-layers 2  # few\n--lr 1e-3\n")
    (tmp_path / "mistakes.py").touch()

    def write_and_read(content: Any) -> Case:
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        (tmp_path / "small.yaml").write_text(text)
        return read_case(tmp_path / "small.yaml")

    return write_and_read


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The small case with another value at a path of keys."""
    content = copy.deepcopy(SMALL)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    table: Any = content
    for key in parents:
        table = table[key]
    table[last] = value
    return content


def test_every_option_is_read(read: Callable[[Any], Case]) -> None:
    large = read(LARGE)
    two = ("--tensor-model-parallel-size", "2", "--name", "a b")
    assert large == Case(
        name="small",
        description="Words on two lines.\n",
        flags=("--num-layers", "2", "--lr", "1e-3", "--optimizer", "dion", "--lr", "2e-3"),
        vocab_size=1024,
        seeds=(1, 2),
        short=True,
        runs={
            "one": RunSpec("one", ()),
            "two": RunSpec("two", two, processes=2),
            "resumed": RunSpec("resumed", (), continues="one", at=30),
        },
        golden=("one", "two"),
        checks=(
            Exact("resumed", "one", ("lr",)),
            Band("two", "one", 0.1, BOTH),
            Band("two", "one", 0.5, ("validation_loss",)),
            Below("one", "two", 60, BOTH),
        ),
        controls=large.controls,
    )


def test_a_control_is_a_run_with_its_mistake(read: Callable[[Any], Case], tmp_path: Path) -> None:
    patch = f"{tmp_path}/mistakes.py:freeze"
    frozen = RunSpec("frozen", (), continues="one", at=30, patch=patch)
    flags = ("--tensor-model-parallel-size", "2", "--name", "a b", "--lr", "1")
    fast = RunSpec("fast", flags, processes=2)
    case = read(LARGE)
    assert case.controls == (
        Control(frozen, (Exact("frozen", "resumed", BOTH),)),
        Control(fast, (Exact("fast", "two", BOTH), Band("fast", "two", 0.1, BOTH))),
    )
    assert case.spec("fast") == fast
    assert case.spec("one") == RunSpec("one", ())


def test_what_may_be_left_out(read: Callable[[Any], Case]) -> None:
    content = {key: SMALL[key] for key in ("description", "arguments", "seeds", "runs", "golden")}
    case = read(content)
    assert case.flags == ("--num-layers", "2", "--lr", "1e-3")
    assert (case.vocab_size, case.short, case.checks, case.controls) == (None, False, (), ())


def test_only_runs_compared_over_seeds_need_all_of_them(read: Callable[[Any], Case]) -> None:
    below = {"below": {"run": "two", "reference": "one", "at": 60}}
    case = read(with_value("checks", [*SMALL["checks"], below]))
    assert [case.seeds_of(name) for name in case.runs] == [(1, 2, 3), (1, 2, 3), (1,)]


@pytest.mark.parametrize("key", ["description", "arguments", "seeds", "runs", "golden"])
def test_what_may_not_be_left_out(read: Callable[[Any], Case], key: str) -> None:
    content = {name: value for name, value in SMALL.items() if name != key}
    with pytest.raises(ConvergenceError, match=rf"small\.yaml: the case has no '{key}'$"):
        read(content)


@pytest.mark.parametrize(
    ("path", "table"),
    [
        ("surprise", "the case"),
        ("runs/two/surprise", "run two"),
        ("checks/0/exact/surprise", "check exact"),
        ("checks/0/exact/share", "check exact"),
        ("controls/wrong/surprise", "control wrong"),
        ("controls/wrong/processes", "control wrong"),
        ("runs/two/patch", "run two"),
    ],
)
def test_unknown_keys_are_refused(read: Callable[[Any], Case], path: str, table: str) -> None:
    key = path.rpartition("/")[2]
    with pytest.raises(ConvergenceError, match=rf"small\.yaml: {table}: unknown '{key}'$"):
        read(with_value(path, 1))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("description", 3, "the case: description cannot be 3"),
        ("description", None, "the case: description cannot be None"),
        ("vocab_size", "1024", "the case: vocab_size cannot be '1024'"),
        ("vocab_size", True, "the case: vocab_size cannot be True"),
        ("short", 1, "the case: short cannot be 1"),
        ("seeds", 3, "the case: seeds cannot be 3"),
        ("seeds", [], "the case: seeds cannot be []"),
        ("seeds", [1, "b"], "the case: seeds cannot be [1, 'b']"),
        ("seeds", [0, 1], "the case: seeds cannot be [0, 1]"),
        ("seeds", [1, 2, 1], "the case: seeds has a value twice: [1, 2, 1]"),
        ("runs", ["one"], "the case: runs cannot be ['one']"),
        ("runs/two", 2, "run two is 2 and not a mapping"),
        ("runs/two/processes", 0, "run two: processes cannot be 0"),
        ("runs/two/processes", 1.5, "run two: processes cannot be 1.5"),
        ("runs/two/flags", ["--lr"], "run two: flags cannot be ['--lr']"),
        ("runs/two/flags", "--a 'b", 'run two: flags cannot be "--a \'b" (No closing quotation)'),
        ("flags", "'", 'the case: flags cannot be "\'" (No closing quotation)'),
        ("runs/two/at", 30, "run two: 'continues' and 'at' need each other"),
        ("runs/two/continues", "one", "run two: 'continues' and 'at' need each other"),
        ("runs/resumed/at", -1, "run resumed: at cannot be -1"),
        ("golden", "one", "the case: golden cannot be 'one'"),
        ("golden", [["one"]], "the case: golden cannot be [['one']]"),
        ("checks", {}, "the case: checks cannot be {}"),
        ("checks/0", "exact", "checks: 'exact' is not one of exact, band, below with its settings"),
        ("checks/0", {"near": {}}, "checks: {'near': {}} is not one of exact, band, below"),
        ("checks/0", {"exact": {}, "band": {}}, "is not one of exact, band, below"),
        ("checks/0/exact", None, "check exact is None and not a mapping"),
        ("checks/0", {"exact": {"run": "one"}}, "check exact has no 'reference'"),
        ("checks/0", {"below": {"run": "two", "reference": "one"}}, "check below has no 'at'"),
        ("checks/0/exact/quantities", "lr", "check exact: quantities cannot be 'lr'"),
        ("checks/0/exact/quantities", [], "check exact: quantities cannot be []"),
        ("checks/0/exact/quantities", [1], "check exact: quantities cannot be [1]"),
        ("controls/wrong/noticed_by", [], "control wrong: noticed_by cannot be []"),
        ("controls/wrong/noticed_by", [["exact"]], "noticed_by cannot be [['exact']]"),
        ("controls/wrong/noticed_by", ["eye"], "{'run': 'wrong', 'reference': 'one'}} is not one"),
        ("controls/wrong/noticed_by", ["below"], "check below has no 'at'"),
        ("controls/wrong/patch", 1, "control wrong: patch cannot be 1"),
        ("controls/wrong/patch", "mistakes.py", "patch cannot be 'mistakes.py': FILE:FUNCTION"),
        ("controls/wrong/patch", "none.py:freeze", "patch cannot be 'none.py:freeze'"),
    ],
)
def test_wrong_values_are_named(
    read: Callable[[Any], Case], path: str, value: Any, message: str
) -> None:
    with pytest.raises(ConvergenceError) as error:
        read(with_value(path, value))
    assert "small.yaml: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("share", [0, -0.1, float("nan"), float("inf"), True, "much"])
def test_a_band_needs_a_width(read: Callable[[Any], Case], share: Any) -> None:
    band = {"run": "two", "reference": "one", "share": share}
    with pytest.raises(ConvergenceError, match=rf"check band: share cannot be {share!r}"):
        read(with_value("checks/0", {"band": band}))


@pytest.mark.parametrize(
    ("path", "by"),
    [
        ("checks/0/exact/run", "a check"),
        ("checks/0/exact/reference", "a check"),
        ("golden/0", "golden"),
        ("runs/resumed/continues", "run resumed"),
    ],
)
def test_unknown_runs_are_refused(read: Callable[[Any], Case], path: str, by: str) -> None:
    message = rf"small\.yaml: {by} names a run 'tow' \(there are one, two, resumed\)"
    with pytest.raises(ConvergenceError, match=message):
        read(with_value(path, "tow"))


def test_a_control_needs_a_run_to_spoil(read: Callable[[Any], Case]) -> None:
    with pytest.raises(ConvergenceError, match=r"control wrong: there is no run 'tow'"):
        read(with_value("controls/wrong/instead_of", "tow"))


def test_a_check_cannot_name_a_control(read: Callable[[Any], Case]) -> None:
    with pytest.raises(ConvergenceError, match="a check names a run 'wrong'"):
        read(with_value("checks/0/exact/run", "wrong"))


def test_a_control_has_a_name_of_its_own(read: Callable[[Any], Case]) -> None:
    with pytest.raises(ConvergenceError, match="control two: a run has this name, too"):
        read(with_value("controls/two", SMALL["controls"]["wrong"]))


@pytest.mark.parametrize("name", ["a/b", "..", "", 2])
@pytest.mark.parametrize(("table", "kind"), [("runs", "run"), ("controls", "control")])
def test_names_become_folders(
    read: Callable[[Any], Case], table: str, kind: str, name: Any
) -> None:
    spec = SMALL["controls"]["wrong"] if table == "controls" else {}
    content = with_value(table, {**SMALL[table], name: spec})
    with pytest.raises(ConvergenceError, match=rf"{kind} .*cannot be the name of its folder"):
        read(content)


def test_runs_that_continue_others_are_not_continued(read: Callable[[Any], Case]) -> None:
    with pytest.raises(ConvergenceError, match="run two: resumed continues another run itself"):
        read(with_value("runs/two", {"continues": "resumed", "at": 40}))


@pytest.mark.parametrize("reference", ["two", "resumed"])
def test_bands_are_around_golden_runs(read: Callable[[Any], Case], reference: str) -> None:
    message = f"band around {reference}: only golden runs have a measured noise"
    with pytest.raises(ConvergenceError, match=message):
        read(with_value("checks/0", {"band": {"run": "one", "reference": reference}}))
    with pytest.raises(ConvergenceError, match=message):
        read(with_value("controls/wrong/instead_of", reference))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("runs: [", "not yaml: while parsing"),
        ("- one\n", "the case is ['one'] and not a mapping"),
        ("", "the case is None and not a mapping"),
    ],
)
def test_what_is_no_case_is_refused(
    read: Callable[[Any], Case], content: str, message: str
) -> None:
    with pytest.raises(ConvergenceError) as error:
        read(content)
    assert f"small.yaml: {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(read: Callable[[Any], Case], tmp_path: Path) -> None:
    with pytest.raises(ConvergenceError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        read_case(tmp_path / "nowhere.yaml")
    with pytest.raises(ConvergenceError, match=r"small\.yaml: the case: arguments cannot be 'x\.a"):
        read(with_value("arguments", "x.args"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConvergenceError, match=r"small\.yaml: not yaml"):
        read_case(tmp_path / "small.yaml")
