"""Reading metrics.jsonl; test_convergence_tensorboard.py reads TensorBoard's event files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dion_tools.convergence.curves import Curves, read_curves
from megatron_dion_tools.convergence.errors import ConvergenceError


def train(iteration: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "iteration": iteration, "lm_loss": loss, **more}


def write(folder: Path, *records: dict[str, Any], end: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return path


def test_a_file_and_its_folder_have_the_same_curves(tmp_path: Path) -> None:
    path = write(tmp_path, train(1, 0.1 + 0.2), train(2, 1 / 3))
    expected = {"lm_loss": {1: 0.1 + 0.2, 2: 1 / 3}}
    assert read_curves(path).quantities == expected
    assert read_curves(tmp_path).quantities == expected


def test_a_run_is_named_by_its_path_unless_it_has_a_name(tmp_path: Path) -> None:
    write(tmp_path, train(1, 2.0))
    assert read_curves(tmp_path).name == str(tmp_path)
    assert read_curves(tmp_path, "DP2").name == "DP2"


@pytest.mark.parametrize("end", ['{"kind": "tra', '{"kind": "train", "iteration": 3}'])
def test_the_line_of_a_killed_process_is_left_out(tmp_path: Path, end: str) -> None:
    path = write(tmp_path, train(1, 2.0), train(2, 1.0), end=end)
    assert read_curves(path).quantities == {"lm_loss": {1: 2.0, 2: 1.0}}


def test_each_kind_has_curves_of_its_own(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        train(1, 4.0),
        train(2, 3.0),
        {"kind": "validation", "iteration": 2, "lm_loss": 3.5},
        {"kind": "test", "iteration": 2, "lm_loss": 3.25},
        {"iteration": 3, "lm_loss": 2.0},
    )
    assert read_curves(path).quantities == {
        "lm_loss": {1: 4.0, 2: 3.0, 3: 2.0},
        "validation_loss": {2: 3.5},
        "test_loss": {2: 3.25},
    }


def test_counters_clocks_and_what_is_no_number_are_not_curves(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        train(1, 2.0, grad_norm=1, lr=1e-3, tokens=2048, skipped=False, optimizer_bytes=7)
        | {"iteration_seconds": 0.5, "optimizer_seconds": 0.1, "householder_fallbacks": 0}
        | {"note": "x", "missing": None},
    )
    curves = read_curves(path).quantities
    assert curves == {"grad_norm": {1: 1.0}, "lm_loss": {1: 2.0}, "lr": {1: 1e-3}}


def test_what_is_not_finite_is_kept_for_checks_to_see(tmp_path: Path) -> None:
    path = write(tmp_path, train(1, math.nan), train(2, math.inf))
    curve = read_curves(path).curve("lm_loss")
    assert math.isnan(curve[1])
    assert curve[2] == math.inf


def test_the_later_of_two_lines_counts_and_iterations_are_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, train(3, 9.0), train(1, 3.0), train(2, 2.5), train(3, 2.0))
    assert list(read_curves(path).curve("lm_loss").items()) == [(1, 3.0), (2, 2.5), (3, 2.0)]


def test_a_run_without_a_line_has_no_curves(tmp_path: Path) -> None:
    curves = read_curves(write(tmp_path, end='{"kind'), "DP2")
    with pytest.raises(ConvergenceError, match=r"^DP2 has no curve of lm_loss \(it has nothing\)$"):
        curves.curve("lm_loss")


def test_a_curve_that_is_not_there_is_explained_by_those_that_are() -> None:
    curves = Curves("DP2", {"grad_norm": {1: 1.0}, "lr": {1: 1.0}})
    with pytest.raises(ConvergenceError, match=r"DP2 has no curve of loss \(it has grad_norm, lr"):
        curves.curve("loss")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"step loss\n1 2.0\n", id="no json"),
        pytest.param(b'{"kind": "train", "lm_loss": 2.0}\n', id="no iteration"),
        pytest.param(b"[1, 2.0]\n", id="a list"),
        pytest.param(b"3\n", id="a number"),
        pytest.param(b"\x18\x00\xff\xfe\n", id="no text"),
        pytest.param(b'{"iteration": 1, "lm_l\n{"iteration": 2, "lm_loss": 2}\n', id="torn inside"),
    ],
)
def test_a_file_without_metrics_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConvergenceError, match=r"other\.jsonl: not lines of metrics"):
        read_curves(path)


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_a_path_without_a_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConvergenceError, match=r"neither a metrics\.jsonl, nor a folder"):
        read_curves(tmp_path / name)
