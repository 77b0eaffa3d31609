"""The verdicts of the doctor's checks, from made-up machines."""

import importlib
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_dion.megatron import capabilities
from megatron_dion_tools import cli
from megatron_dion_tools.doctor import checks, examination, report
from megatron_dion_tools.doctor.checks import FAILED, OK, WARNING, Finding

H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05"
A100 = "NVIDIA A100, 40960 MiB, 580.95.05"


def pretend_installed(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path | None) -> None:
    spec = None if folder is None else ModuleSpec(name, None, is_package=True)
    if spec is not None and spec.submodule_search_locations is not None:
        spec.submodule_search_locations.append(str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: spec if asked == name else None)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(checks, "count_gpus", lambda: number)


def test_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.megatron().verdict == OK
    monkeypatch.setattr(capabilities, "TESTED", ())
    assert checks.megatron().verdict == WARNING
    monkeypatch.setattr(capabilities, "NEEDED", {"core/no_such_file.py": "name"})
    assert (checks.megatron().verdict, checks.megatron().fix) == (FAILED, capabilities.FIX)


@pytest.mark.parametrize(
    ("installed", "number", "verdict", "said"),
    [
        ({"apex", "amp_C", "flash_attn"}, 8, OK, "apex, flash_attn; not installed: fused_weight"),
        ({"apex"}, 0, FAILED, "apex is not NVIDIA's"),
        ({"apex", "transformer_engine"}, 8, WARNING, "apex is not NVIDIA's"),
        (set(), 0, OK, "none is used"),
    ],
)
def test_kernels(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], number: int, verdict: str, said: str
) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    pretend_gpus(monkeypatch, number)
    assert checks.kernels().verdict == verdict
    assert said in checks.kernels().text


def broken(name: str) -> ModuleType:
    raise OSError("libtransformer_engine.so: undefined symbol")


@pytest.mark.parametrize(
    ("installed", "on_cpu", "on_gpus"),
    [(False, OK, WARNING), (True, WARNING, OK), ("half of it", FAILED, FAILED)],
)
def test_transformer_engine(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: bool | str,
    on_cpu: str,
    on_gpus: str,
) -> None:
    pretend_installed(monkeypatch, "transformer_engine", tmp_path if installed else None)
    monkeypatch.setattr(importlib, "import_module", ModuleType if installed is True else broken)
    for number, verdict in ((0, on_cpu), (8, on_gpus)):
        pretend_gpus(monkeypatch, number)
        assert checks.transformer_engine().verdict == verdict


@pytest.mark.parametrize(
    ("files", "locked", "number", "verdict"),
    [
        (1024, resource.RLIM_INFINITY, 0, WARNING),
        (65536, 2**16, 0, OK),
        (65536, 2**16, 8, WARNING),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 8, OK),
    ],
)
def test_limits(
    monkeypatch: pytest.MonkeyPatch, files: int, locked: int, number: int, verdict: str
) -> None:
    limits = {resource.RLIMIT_NOFILE: files, resource.RLIMIT_MEMLOCK: locked}
    monkeypatch.setattr(checks.resource, "getrlimit", lambda kind: (limits[kind], 0))
    pretend_gpus(monkeypatch, number)
    assert checks.limits().verdict == verdict


def test_nccl_is_needed_by_gpus_and_shared_memory_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.torch.distributed, "is_nccl_available", lambda: False)
    assert checks.pytorch().verdict == OK
    pretend_gpus(monkeypatch, 1)
    assert checks.pytorch().verdict == FAILED
    for size, verdict in ((2**20, WARNING), (5 * 2**30, OK)):
        usage = SimpleNamespace(total=size)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, usage=usage: usage)
        assert checks.shared_memory().verdict == verdict


@pytest.mark.parametrize(
    ("listed", "usable", "expected", "verdict", "text"),
    [
        ([], 0, None, OK, "no CUDA device"),
        ([], 0, 8, FAILED, "torch can use 0 GPUs, not 8"),
        ([H100], 0, None, FAILED, "1 x NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05, but"),
        (8 * [H100], 8, 8, OK, "8 x NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05"),
        (8 * [H100], 7, 8, FAILED, "torch can use 7 GPUs, not 8: 8 x NVIDIA"),
        ([H100, A100], 2, None, WARNING, "1 x NVIDIA H100"),
        ([], 2, 2, OK, "2 GPUs"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    listed: Sequence[str],
    usable: int,
    expected: int | None,
    verdict: str,
    text: str,
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
    program.chmod(0o755 if listed else 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    pretend_gpus(monkeypatch, usable)
    finding = checks.gpus(expected)
    assert finding.verdict == verdict
    assert finding.text.startswith(text)


def test_checks_that_raise_or_hang_are_failures() -> None:
    never = threading.Event()
    fine = {"good": lambda: Finding(OK, ""), "raises": lambda: Finding(OK, str(1 // 0))}
    findings = examination.examine(fine, seconds=60)
    assert findings["good"] == Finding(OK, "")
    assert findings["raises"].text.startswith("ZeroDivisionError")
    findings |= examination.examine({"hangs": lambda: Finding(OK, str(never.wait()))}, 0.01)
    assert findings["hangs"].text == "no end within 0.01 s"
    for name in ("raises", "hangs"):
        assert (findings[name].verdict, findings[name].ended) == (FAILED, False)
    never.set()


def test_table_parts_ranks_by_their_findings_and_ends_with_the_verdict() -> None:
    fine, bad, old = Finding(OK, "2"), Finding(WARNING, "1", "bake"), Finding(OK, "v1", same=True)
    rows = report.merge(
        {
            0: {"cake": fine, "oven": old},
            1: {"cake": bad, "oven": old},
            2: {"cake": Finding(OK, "3"), "oven": old._replace(text="v2")},
            3: {"cake": bad, "oven": old},
        }
    )
    assert report.table(rows).splitlines() == [
        "check  verdict  ranks   finding",
        "cake   warning  1, 3    1",
        "                        -> bake",
        "cake   ok       0, 2    2",
        "oven   failed   0-1, 3  v1",
        "                        -> give all ranks the same image or environment",
        "oven   failed   2       v2",
        "                        -> give all ranks the same image or environment",
        "verdict: failed: oven; warning: cake",
    ]
    assert report.worst(rows) == FAILED
    assert report.table(report.merge({0: {"cake": fine}})).splitlines()[-1] == "verdict: ok"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is set, but not MASTER_ADDR and MASTER_PORT"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "no rank 0 at 127.0.0.1:1",
        ),
    ],
)
def test_launcher_that_tells_half_or_rank_zero_that_does_not_answer(
    environ: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examination.run(cli.parse("doctor --timeout 0.05".split()), environ) == 1
    assert f"error: rank 1: {said}" in capsys.readouterr().err


def test_without_collectives_a_rank_stays_alone(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "SLURM_NTASKS": "2"}
    code = examination.run(cli.parse("doctor --no-collectives".split()), environ)
    table = capsys.readouterr().out
    assert code == int("failed" in table.splitlines()[-1])
    assert "packages " in table
    assert "all_reduce" not in table


def test_one_task_of_slurm_that_thinks_it_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    examination.run(cli.parse("doctor --no-collectives".split()), {"SLURM_NTASKS": "16"})
    assert "one process, but Slurm has started 16 tasks" in capsys.readouterr().out


def test_command_ends_with_the_verdict() -> None:
    line = [sys.executable, "-m", "megatron_dion_tools", "doctor", "--no-collectives"]
    ended = subprocess.run([*line, "--expect-gpus", "99"], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "failed: gpus" in ended.stdout.splitlines()[-1]
