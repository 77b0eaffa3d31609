"""Files of cases and studies: what is read, and what is said of mistakes."""

from pathlib import Path

import pytest

from megatron_dion_tools.convergence.case import Check, RunSpec, read_case
from megatron_dion_tools.convergence.study import Method, read_study
from megatron_dion_tools.errors import ToolError
from tests.project import ROOT

CASE = """
description: a case
arguments: model.args
flags: --optimizer dion
seeds: [1, 2, 3]
runs:
  one: {}
  two: {processes: 2, flags: "--name 'a b' --bf16"}
  later: {continues: one, at: 10}
  broken: {patch: "mistakes.py:break_it"}
golden: [one]
checks:
  - {runs: [two, later], reference: one, share: 0}
  - {runs: [broken], reference: one, quantities: [lm_loss], notices: true}
"""
STUDY = """
question: Which is better?
arguments: model.args
axes:
  width: {"64": --hidden-size 64, 128: ""}
  memory: {fp32: "", bf16: --dion-momentum-dtype bf16}
methods:
  Base: {flags: --optimizer adam, lr: 0.004}
  New 1/4: {lr: 1}
baseline: Base
seeds: [1, 2]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.args").write_text("--lr 1  # the rate\n")
    (tmp_path / "mistakes.py").write_text("def break_it(): pass\n")
    return tmp_path


def written(folder: Path, text: str) -> Path:
    (folder / "example.yaml").write_text(text)
    return folder / "example.yaml"


def test_case_is_read(folder: Path) -> None:
    case = read_case(written(folder, CASE))
    assert case.name == "example"
    assert case.common_flags == ("--lr", "1", "--optimizer", "dion")
    assert case.runs == {
        "one": RunSpec(),
        "two": RunSpec(flags=("--name", "a b", "--bf16"), processes=2),
        "later": RunSpec(continues="one", at=10),
        "broken": RunSpec(patch="mistakes.py:break_it"),
    }
    assert case.checks == (
        Check(("two", "later"), "one", share=0.0),
        Check(("broken",), "one", quantities=("lm_loss",), notices=True),
    )
    assert case.golden_folder == folder / "golden" / "example"


def test_study_is_read(folder: Path) -> None:
    study = read_study(written(folder, STUDY))
    assert study.settings == {
        "width 64, memory fp32": ("--hidden-size", "64"),
        "width 64, memory bf16": ("--hidden-size", "64", "--dion-momentum-dtype", "bf16"),
        "width 128, memory fp32": (),
        "width 128, memory bf16": ("--dion-momentum-dtype", "bf16"),
    }
    assert study.methods == {
        "Base": Method(0.004, ("--optimizer", "adam")),
        "New 1/4": Method(1.0),
    }
    assert (study.baseline, study.rates, study.vocab_size) == ("Base", (), None)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("golden: [one]", "golden: [one]\nshort: true", "the file: unknown key 'short'"),
        ("golden: [one]", "", "the file: no key 'golden'"),
        ("golden: [one]", "golden: one", "the file: golden cannot be 'one'"),
        ("golden: [one]", "golden: [other]", r"golden names the run 'other' \(there are one,"),
        ("[1, 2, 3]", "[1, 0]", "seeds cannot be 0"),
        ("processes: 2", "processes: true", "runs: two: processes cannot be True"),
        ('--bf16"', "'\"", "No closing quotation"),
        ("model.args", "none.args", r"cannot read .*none.args \(No such file or directory\)"),
        ("share: 0", "share: -1", "checks: share cannot be -1"),
        ("at: 10", "", "run later: 'continues' and 'at' need each other"),
        ("reference: one, share: 0", "reference: two", "only golden runs have a measured noise"),
        ('break_it"', '"', "patch 'mistakes.py:' is not FILE:FUNCTION"),
        ("mistakes.py", "none.py", "patch 'none.py:break_it' is not FILE:FUNCTION"),
        ("{}", "{continues: later, at: 1}", "itself continues another run"),
        ("description: a case", "description: [", "flow"),
    ],
)
def test_mistake_in_a_case_is_one_line(folder: Path, old: str, new: str, complaint: str) -> None:
    assert old in CASE
    with pytest.raises(ToolError, match=complaint) as error:
        read_case(written(folder, CASE.replace(old, new)))
    assert str(error.value).startswith(f"{folder / 'example.yaml'}: ")
    assert "\n" not in str(error.value)


def test_a_baseline_that_is_no_method_is_named(folder: Path) -> None:
    text = STUDY.replace("baseline: Base", "baseline: Basis")
    with pytest.raises(ToolError, match=r"baseline 'Basis' is not a method \(there are Base, New"):
        read_study(written(folder, text))


@pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*.yaml")), ids=lambda path: path.stem)
def test_studies_of_the_project_are_read(path: Path) -> None:
    assert read_study(path).methods
