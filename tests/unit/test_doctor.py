"""The verdicts of the doctor's checks, from made-up machines."""

import importlib
import resource
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from megatron_dion.megatron import launch
from megatron_dion_tools import cli
from megatron_dion_tools.doctor import (
    collectives,
    examination,
    gpus,
    machine,
    report,
    software,
)
from megatron_dion_tools.doctor.collectives import Link
from megatron_dion_tools.doctor.findings import FAILED, OK, WARNING, Finding, examine

GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3, 81559, 580.95.05, 345, 1980, {reasons}"
A100 = "NVIDIA A100, 40960, 580.95.05, [N/A], [N/A], [N/A]"
IDLE, POWER_CAP = "0x0000000000000001", "0x0000000000000004"


def pretend_installed(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path | None) -> None:
    spec = None if folder is None else ModuleSpec(name, None, is_package=True)
    if spec is not None and spec.submodule_search_locations is not None:
        spec.submodule_search_locations.append(str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: spec if asked == name else None)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for module in (gpus, machine, software):
        monkeypatch.setattr(module, "count_gpus", lambda: number)


def test_other_megatron_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.megatron().verdict == OK
    monkeypatch.setattr(launch, "TESTED_MEGATRON_CORE", "9.9.9")
    assert software.megatron().fix == "pip install megatron-core==9.9.9"
    assert software.megatron().verdict == FAILED


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
        assert software.transformer_engine().verdict == verdict


def test_nccl_is_needed_by_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.torch.distributed, "is_nccl_available", lambda: False)
    assert software.pytorch().verdict == OK
    pretend_gpus(monkeypatch, 1)
    assert software.pytorch().verdict == FAILED


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
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (limits[kind], 0))
    pretend_gpus(monkeypatch, number)
    assert machine.limits().verdict == verdict


@pytest.mark.parametrize(("size", "verdict"), [(2**20, WARNING), (5 * GIB, OK)])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, size: int, verdict: str) -> None:
    usage = namedtuple("usage", "total")(size)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert machine.shared_memory().verdict == verdict


@pytest.mark.parametrize(
    ("listed", "usable", "expected", "verdict", "text"),
    [
        ([], 0, None, OK, "no CUDA device"),
        ([], 0, 8, FAILED, "torch can use 0 GPUs, not 8"),
        ([H100], 0, None, FAILED, "1 x NVIDIA H100 80GB HBM3, 81559 MiB, driver 580.95.05, but"),
        (8 * [H100], 8, 8, OK, "8 x NVIDIA H100 80GB HBM3, 81559 MiB, driver 580.95.05"),
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
    nvidia_smi_says(monkeypatch, tmp_path, [line.format(reasons=IDLE) for line in listed])
    pretend_gpus(monkeypatch, usable)
    finding = gpus.gpus(expected)
    assert finding.verdict == verdict
    assert finding.text.startswith(text)


def nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: Sequence[str]) -> None:
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines or ()))
    program.chmod(0o755 if lines else 0)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("reasons", "fault"),
    [
        (POWER_CAP, None),
        ("0x0000000000000008", "hardware slowdown"),
        ("0x0000000000000060", "software thermal slowdown, hardware thermal slowdown"),
        ("0x0000000000000080", "hardware power brake"),
    ],
)
def test_throttling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reasons: str, fault: str | None
) -> None:
    lines = [H100.format(reasons=one) for one in (IDLE, IDLE, reasons)]
    nvidia_smi_says(monkeypatch, tmp_path, lines)
    pretend_gpus(monkeypatch, 3)
    finding = gpus.gpus(3)
    assert finding.verdict == (WARNING if fault else OK)
    assert not fault or finding.text == f"GPU 2 at 345 of 1980 MHz ({fault})"


def test_clocks() -> None:
    hosts = {0: "a", 1: "b", 2: "b"}
    assert examination.judge_clocks({0: 100.0, 1: 100.2, 2: 100.1}, hosts).verdict == OK
    finding = examination.judge_clocks({0: 100.0, 1: 100.2, 2: 107.0}, hosts)
    assert finding.verdict == WARNING
    assert finding.text == "rank 2 on b is 7 s ahead of rank 0 on a"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_ring_has_each_neighbour_once(size: int) -> None:
    wanted = {frozenset((rank, (rank + 1) % size)) for rank in range(size) if size > 1}
    ring = collectives.ring(size)
    assert {frozenset(pair) for pair in ring} == wanted
    assert len(ring) == len(wanted)


def test_slow_link_is_named_among_links_of_its_kind() -> None:
    hosts = {rank: f"host {rank // 3}" for rank in range(9)}
    speeds = {(a, b): 4e9 if hosts[a] != hosts[b] else 4e10 for a, b in collectives.ring(9)}
    links = [Link(a, b, 2e-5, speed) for (a, b), speed in speeds.items()]
    assert collectives.judge_links(links, hosts).verdict == OK
    speeds[8, 0] = 1.5e9
    links = [Link(a, b, 2e-5, speed) for (a, b), speed in speeds.items()]
    finding = collectives.judge_links(links, hosts)
    assert finding.verdict == WARNING
    assert finding.text.startswith("slow 8-0: 20 us, 1.50 GB/s; within a node: slowest of 6 is ")


def test_checks_that_raise_or_hang_are_failures() -> None:
    never = threading.Event()
    checks = {
        "raises": lambda: Finding(OK, str(1 // 0)),
        "hangs": lambda: Finding(OK, str(never.wait())),
    }
    raised = examine({"raises": checks["raises"], "good": lambda: Finding(OK, "")}, seconds=60)
    assert raised["good"] == Finding(OK, "")
    assert raised["raises"].text.startswith("ZeroDivisionError")
    hung = examine({"hangs": checks["hangs"]}, seconds=0.01)
    assert hung["hangs"].text == "no end within 0.01 s"
    for finding in (raised["raises"], hung["hangs"]):
        assert (finding.verdict, finding.ended) == (FAILED, False)
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


def test_without_collectives_a_rank_stays_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "SLURM_NTASKS": "2"}
    args = cli.parse(f"doctor --no-collectives --shared-folder {tmp_path}".split())
    code = examination.run(args, environ)
    table = capsys.readouterr().out
    assert code == int("failed" in table.splitlines()[-1])
    assert "shared folder " in table
    assert "all_reduce" not in table


def test_one_task_of_slurm_that_thinks_it_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    examination.run(cli.parse("doctor --no-collectives".split()), {"SLURM_NTASKS": "16"})
    assert "one process, but Slurm has started 16 tasks" in capsys.readouterr().out


def test_command_ends_with_the_verdict(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "megatron_dion_tools", "doctor", "--no-collectives"]
    line += ["--shared-folder", str(tmp_path / "none")]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "failed: shared folder" in ended.stdout.splitlines()[-1]
