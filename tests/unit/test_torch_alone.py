"""What a GPU is measured and tested with, where torch is installed and Megatron is not."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import benchmarks.gpu
import benchmarks.step
from tests.project import ROOT, link_packages

WITHOUT = ("megatron", "megatron_core", "transformer_engine", "emerging_optimizers", "apex")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For a Python with the packages of this one but those that GPU containers may lack."""
    folder = tmp_path_factory.mktemp("torch_alone") / "packages"
    link_packages(folder, WITHOUT)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools"), str(folder)])
    }


def run(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", *args]  # without the packages of this Python
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_part_of_the_benchmark_runs(environment: dict[str, str], tmp_path: Path) -> None:
    flags = ["--tiny", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path / "gpu.json")]
    ended = run(environment, "-m", "benchmarks.gpu", *flags)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["machine"]["megatron-core"] is None
    tables = result["tables"]
    assert {name[0] for name in tables} == set("1234567")
    assert all(f"\n{name}\n" in ended.stdout for name in tables)
    assert max(row["of_Q"] for row in tables["1 orthonormalize"]) < 1e-3
    assert max(row["weight"] for row in tables["1 errors of steps"]) < 3e-6
    lacking = [name for name, rows in tables.items() if rows == [{"not measured": "needs CUDA"}]]
    assert lacking == ["2 host waits", "4 memory and kernels"]


def test_a_part_that_raises_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Iterator[Any]:
        yield "begun", [{"a": 1}]
        raise RuntimeError("out of memory\nmore")

    def wrong(*_: Any) -> Iterator[Any]:
        yield "bits", [{"right": "True"}, {"right": "False"}]

    monkeypatch.setattr(benchmarks.gpu, "PARTS", (broken, benchmarks.gpu.first_steps, wrong))
    output = tmp_path / "gpu.json"
    assert benchmarks.gpu.main(["--tiny", "--device", "cpu", "--output", str(output)]) == 1
    tables = json.loads(output.read_text())["tables"]
    assert list(tables) == ["1 begun", "1 failed", "2 first steps", "3 bits"]
    assert tables["1 failed"] == [{"error": "RuntimeError: out of memory"}]
    assert capsys.readouterr().out.splitlines()[-1] == "wrong: 1 failed; 3 bits"
    monkeypatch.setattr(benchmarks.gpu, "SECONDS", 0)
    assert benchmarks.gpu.main(["--tiny", "--device", "cpu", "--output", str(output)]) == 0
    assert list(json.loads(output.read_text())["tables"]) == ["1 skipped", "2 skipped", "3 skipped"]


@pytest.mark.parametrize("flags", ["", "--device cuda --tiny"])
def test_a_benchmark_for_gpus_wants_one(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("torch.cuda.is_available", return_value=False), pytest.raises(SystemExit):
        benchmarks.gpu.main(flags.split())
    assert "torch sees no GPU" in capsys.readouterr().err.splitlines()[-1]


def test_the_benchmark_of_a_step_has_no_muon_without_megatron(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks.step, "HAS_MEGATRON", False)
    flags = "--device cpu --matrices 2x24 --hidden 64 --fractions 1/4 --repeats 1 --output"
    benchmarks.step.main([*flags.split(), str(tmp_path / "step.json")])
    assert "has no Muon" in capsys.readouterr().out.splitlines()[0]
    weights = json.loads((tmp_path / "step.json").read_text())["tables"]["weights"]
    assert [row["optimizer"] for row in weights] == ["AdamW", "Dion 1/4", "Dion 1/4, residual"]


@pytest.mark.parametrize(
    ("asked", "status", "last"),
    [({}, 0, r"\d+ skipped in .*"), ({"TEST_DEVICE": "cuda"}, 1, ".*: torch sees no GPU")],
)
def test_tests_for_gpus_are_an_error_without_one_if_asked_for(
    environment: dict[str, str], asked: dict[str, str], status: int, last: str
) -> None:
    hidden = environment | {"CUDA_VISIBLE_DEVICES": ""} | asked
    ended = run(hidden, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu")
    lines = (ended.stdout + ended.stderr).split("\n")[:-1]
    assert ended.returncode == status, ended.stdout
    assert re.fullmatch(last, lines[-1])
    assert len([line for line in lines if line]) == 1 or status == 0
