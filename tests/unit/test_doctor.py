"""The verdicts of the doctor's checks, from made-up machines."""

import importlib
import json
import resource
import subprocess
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from megatron_dion.megatron import environment
from megatron_dion_tools import cli
from megatron_dion_tools.doctor import (
    clocks,
    command,
    doctor,
    gpus,
    links,
    machine,
    report,
    shared_folder,
    software,
    world,
)
from megatron_dion_tools.doctor.findings import Finding, Verdict, examine, failed, ok, warning
from megatron_dion_tools.doctor.links import Link
from megatron_dion_tools.doctor.ranks import in_words
from megatron_dion_tools.doctor.report import RankReport

OK, WARNING, FAILED = Verdict
GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3, 81559, 580.95.05, {clock}, 1980, {reasons}\n"


def pretend_installed(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path | None) -> None:
    spec = None if folder is None else ModuleSpec(name, None, is_package=True)
    if spec is not None and spec.submodule_search_locations is not None:
        spec.submodule_search_locations.append(str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: spec if asked == name else None)


@pytest.mark.parametrize(("version", "verdict"), [((3, 11, 9), FAILED), ((3, 12, 0), OK)])
def test_python(version: tuple[int, ...], verdict: Verdict) -> None:
    assert software.python(version).verdict is verdict


@pytest.mark.parametrize(
    ("version", "verdict"), [("2.5.1", FAILED), ("2.6.0a0+df5bbc09", OK), ("2.14.1+cu130", OK)]
)
def test_torch(version: str, verdict: Verdict) -> None:
    assert software.pytorch(version, None).verdict is verdict


def test_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.megatron_core().verdict is OK
    monkeypatch.setattr(environment, "TESTED_MEGATRON_CORE", "9.9.9")
    finding = software.megatron_core()
    assert finding.verdict is FAILED
    assert finding.found.endswith("tested is 9.9.9")
    assert finding.fix == "pip install megatron-core==9.9.9"


def test_transformer_engine_is_missed_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "transformer_engine", None)
    assert software.transformer_engine(gpus=0).verdict is OK
    assert software.transformer_engine(gpus=8).verdict is WARNING


def test_transformer_engine_is_in_the_way_on_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_installed(monkeypatch, "transformer_engine", tmp_path)
    monkeypatch.setattr(importlib, "import_module", ModuleType)
    assert software.transformer_engine(gpus=0).verdict is WARNING
    assert software.transformer_engine(gpus=8).verdict is OK


def test_half_installed_transformer_engine_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def without_extension(name: str) -> ModuleType:
        raise OSError("libtransformer_engine.so: undefined symbol")

    pretend_installed(monkeypatch, "transformer_engine", tmp_path)
    monkeypatch.setattr(importlib, "import_module", without_extension)
    finding = software.transformer_engine(gpus=0)
    assert finding.verdict is FAILED
    assert "undefined symbol" in finding.found


def test_apex_of_the_package_index_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_installed(monkeypatch, "apex", None)
    assert software.apex().verdict is OK
    pretend_installed(monkeypatch, "apex", tmp_path)
    assert software.apex().verdict is FAILED
    assert software.apex().fix == "pip uninstall apex"
    (tmp_path / "multi_tensor_apply").mkdir()
    assert software.apex().verdict is OK


def test_nccl_is_needed_by_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.torch.distributed, "is_nccl_available", lambda: False)
    assert software.nccl(gpus=0).verdict is OK
    assert software.nccl(gpus=1).verdict is FAILED


def test_optional_kernels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_installed(monkeypatch, "flash_attn", tmp_path)
    finding = software.optional_kernels()
    assert finding.verdict is OK
    there, _, missing = finding.found.partition(" (not there: ")
    assert there == "flash_attn"
    assert "deep_ep" in missing


@pytest.mark.parametrize(
    ("limit", "verdict"), [(1024, WARNING), (65536, OK), (resource.RLIM_INFINITY, OK)]
)
def test_open_files(limit: int, verdict: Verdict) -> None:
    assert machine.open_files(limit).verdict is verdict


@pytest.mark.parametrize(
    ("gpus", "limit", "verdict"),
    [(0, 2**16, OK), (8, 2**16, WARNING), (8, resource.RLIM_INFINITY, OK)],
)
def test_locked_memory(gpus: int, limit: int, verdict: Verdict) -> None:
    assert machine.locked_memory(gpus, limit).verdict is verdict


def test_shared_memory(tmp_path: Path) -> None:
    docker_default = 64 * 2**20
    assert machine.shared_memory(tmp_path, docker_default).verdict is WARNING
    assert "64 MiB" in machine.shared_memory(tmp_path, docker_default).found
    assert machine.shared_memory(tmp_path, 16 * GIB).verdict is OK
    assert machine.shared_memory(tmp_path / "none").verdict is WARNING


def test_disk(tmp_path: Path) -> None:
    future = tmp_path / "runs" / "next"
    assert machine.disk(future, 100 * GIB).verdict is OK
    assert machine.disk(future, 5 * GIB).verdict is WARNING
    assert machine.disk(future, 2**20).verdict is FAILED
    assert not future.exists()
    assert list(tmp_path.iterdir()) == []


def test_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    finding = machine.disk(tmp_path, 100 * GIB)
    assert finding.verdict is FAILED
    assert "Permission denied" in finding.found


def eight(reasons: str = "0x0000000000000001", clock: int = 345) -> list[gpus.Gpu]:
    return gpus.parse_gpus(8 * H100.format(clock=clock, reasons=reasons))


def test_no_gpu_matters_only_where_one_is_expected() -> None:
    assert gpus.gpus(0, None, []) == ok("no CUDA device")
    assert gpus.gpus(0, 8, []).verdict is FAILED
    assert gpus.gpus(0, 8, []).found == "no CUDA device"


def test_gpus_are_counted_and_named() -> None:
    finding = gpus.gpus(8, 8, eight())
    assert finding == ok("8 x NVIDIA H100 80GB HBM3, 79.6 GiB, driver 580.95.05")
    assert gpus.gpus(7, 8, eight()).verdict is FAILED
    assert gpus.gpus(8, None, eight()).verdict is OK


def test_driver_that_torch_cannot_use_fails() -> None:
    assert gpus.gpus(0, None, eight()).verdict is FAILED


def test_gpus_of_two_kinds_are_a_warning() -> None:
    mixed = [*eight(), gpus.Gpu("NVIDIA A100", 40 * GIB)]
    assert gpus.gpus(9, None, mixed).verdict is WARNING


@pytest.mark.parametrize(
    ("reasons", "fault"),
    [
        ("0x0000000000000001", None),  # idle
        ("0x0000000000000004", None),  # power cap
        ("0x0000000000000008", "hardware slowdown"),
        ("0x0000000000000060", "software thermal slowdown, hardware thermal slowdown"),
        ("0x0000000000000080", "hardware power brake"),
    ],
)
def test_throttling(reasons: str, fault: str | None) -> None:
    finding = gpus.gpu_clocks(eight()[:3] + eight(reasons)[:1])
    assert finding.verdict is (OK if fault is None else WARNING)
    if fault is not None:
        assert finding.found == f"GPU 3 at 345 of 1980 MHz ({fault})"


def test_clocks_that_the_driver_does_not_tell() -> None:
    unknown = gpus.parse_gpus("NVIDIA GB10, [N/A], 580.95, [N/A], [N/A], [N/A]\n")
    assert gpus.gpu_clocks(unknown).verdict is OK
    assert "unknown" in gpus.gpu_clocks(unknown).found


def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    line = H100.format(clock=1980, reasons="0x0")
    program.write_text(f"#!/bin/sh\necho '{line.strip()}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    [gpu] = gpus.read_gpus()
    assert gpu == gpus.Gpu(
        "NVIDIA H100 80GB HBM3", 81559 * 2**20, "580.95.05", 1980, 1980, reasons=0
    )


def test_without_nvidia_smi_torch_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Properties:
        name = "NVIDIA H100"
        total_memory = 80 * GIB

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "count_gpus", lambda: 2)
    monkeypatch.setattr(gpus.torch.cuda, "get_device_properties", lambda index: Properties)
    assert gpus.read_gpus() == 2 * [gpus.Gpu("NVIDIA H100", 80 * GIB)]


def test_shared_folder(tmp_path: Path) -> None:
    assert shared_folder.write(tmp_path, "word").verdict is OK
    assert shared_folder.read(tmp_path, "word").verdict is OK
    assert shared_folder.remove(tmp_path, "word").verdict is OK
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_shared(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "yours").mkdir()
    assert shared_folder.write(tmp_path / "mine", "word").verdict is OK
    assert shared_folder.read(tmp_path / "yours", "word").verdict is FAILED
    (tmp_path / "yours" / ".doctor-word").write_text("another")
    assert "other content" in shared_folder.read(tmp_path / "yours", "word").found
    assert shared_folder.write(tmp_path / "none", "word").verdict is FAILED


def test_clocks() -> None:
    hosts = {0: "a", 1: "b", 2: "b"}
    assert clocks.judge({0: 100.0, 1: 100.2, 2: 100.1}, hosts).verdict is OK
    finding = clocks.judge({0: 100.0, 1: 100.2, 2: 107.0}, hosts)
    assert finding.verdict is WARNING
    assert finding.found == "within 7 s: rank 2 on b is ahead of rank 0 on a"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_ring_has_each_neighbour_once(size: int) -> None:
    wanted = {frozenset((rank, (rank + 1) % size)) for rank in range(size) if size > 1}
    assert {frozenset(pair) for pair in links.ring(size)} == wanted
    assert len(links.ring(size)) == len(wanted)


def test_slow_link_is_named_among_those_of_its_kind() -> None:
    hosts = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c", 5: "c"}
    fast, slow = 300e9, 40e9
    ring = [
        Link(a, b, 2e-5, fast if hosts[a] == hosts[b] else slow) for a, b in links.ring(len(hosts))
    ]
    finding = links.judge(ring, hosts)
    assert finding.verdict is OK
    assert "within a node: slowest of 3 is " in finding.found
    assert "between nodes: slowest of 3 is " in finding.found
    lazy = [Link(3, 4, 1e-3, slow) if link.first == 3 else link for link in ring]
    assert "the longest latency has 3-4: 1000 us" in links.judge(lazy, hosts).found
    lame = [Link(5, 0, 9e-5, 4e9) if link.first == 5 else link for link in ring]
    finding = links.judge(lame, hosts)
    assert finding.verdict is WARNING
    assert "slow 5-0: 90 us, 4.00 GB/s" in finding.found


def test_check_that_raises_is_a_failure() -> None:
    finding = examine("cake", lambda: ok(str(1 // 0)), seconds=60)
    assert (finding.name, finding.verdict, finding.aborted) == ("cake", FAILED, True)
    assert finding.found.startswith("ZeroDivisionError")


def test_check_that_hangs_is_a_failure() -> None:
    never = threading.Event()
    finding = examine("cake", lambda: ok(str(never.wait())), seconds=0.01)
    assert (finding.verdict, finding.aborted) == (FAILED, True)
    assert finding.found == "no end within 0.01 s"
    never.set()


def named(finding: Finding, name: str = "cake") -> Finding:
    return examine(name, lambda: finding, seconds=60)


def reports(*findings: Finding) -> dict[int, RankReport]:
    return {rank: RankReport("host", findings=[named(one)]) for rank, one in enumerate(findings)}


def test_ranks_that_are_fine_share_a_row() -> None:
    [row] = report.merge(reports(ok("free: 10"), ok("free: 11"), ok("free: 12")))
    assert (row.verdict, row.ranks, row.found) == (OK, (0, 1, 2), "free: 10")


def test_ranks_that_are_not_are_told_apart() -> None:
    rows = report.merge(reports(ok("2"), warning("1", "bake"), failed("0", "buy"), ok("2")))
    assert [(row.verdict, row.ranks) for row in rows] == [
        (FAILED, (2,)),
        (WARNING, (1,)),
        (OK, (0, 3)),
    ]


def test_what_must_be_alike_and_is_not_fails() -> None:
    old, new = ok("2.6", alike=True), ok("2.7", alike=True)
    [row] = report.merge(reports(old, old))
    assert row.verdict is OK
    rows = report.merge(reports(old, new, old))
    assert [(row.verdict, row.ranks, row.found) for row in rows] == [
        (FAILED, (0, 2), "2.6"),
        (FAILED, (1,), "2.7"),
    ]


def test_report_survives_its_journey() -> None:
    sent = RankReport("host", 1.5, [named(warning("1", "bake"))], [Link(0, 1, 1e-5, 1e9)])
    assert RankReport.from_json(sent.to_json()) == sent


def test_table_ends_with_the_verdict() -> None:
    rows = report.merge(reports(ok("2"), warning("1", "bake")))
    assert report.table(rows).splitlines() == [
        "check  verdict  ranks  finding",
        "cake   warning  1      1",
        "                       -> bake",
        "cake   ok       0      2",
        "verdict: warning: cake",
    ]
    assert report.table(report.merge(reports(ok("2")))).splitlines()[-1] == "verdict: ok"
    rows += report.merge({0: RankReport("host", findings=[named(failed("0", ""), "tea")])})
    assert report.table(rows).splitlines()[-1] == "verdict: failed: tea; warning: cake"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "rank 3"), ([2, 0, 1], "ranks 0-2"), ([0, 1, 3, 7, 8], "ranks 0-1, 3, 7-8")],
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert in_words(ranks) == words


def test_one_task_of_slurm_that_thinks_it_is_alone() -> None:
    single = world.alone(patience=1)
    assert doctor.attendance(single, {0: "a"}, {}).verdict is OK
    assert doctor.attendance(single, {0: "a"}, {"SLURM_NTASKS": "16"}).verdict is WARNING


def test_launcher_that_tells_half() -> None:
    with pytest.raises(world.LostError, match="MASTER_ADDR and MASTER_PORT"):
        world.join({"RANK": "1", "WORLD_SIZE": "2"}, patience=1)


def test_rank_zero_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert doctor.run(doctor.Options(patience=0.1), environ) == 1
    assert "rank 1: no rank 0 answers at 127.0.0.1:1" in capsys.readouterr().err


def test_without_collectives_a_rank_stays_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    options = doctor.Options(
        collectives=False, run_dir=tmp_path, shared_folder=tmp_path, json=tmp_path / "found.json"
    )
    code = doctor.run(options, environ)
    table = capsys.readouterr().out.splitlines()
    assert table[-1].startswith("verdict: ")
    assert code == (1 if "failed" in table[-1] else 0)
    found = json.loads((tmp_path / "found.json").read_text())
    names = [finding["name"] for finding in found["findings"]]
    assert "shared folder" in names
    assert "all_reduce" not in names


def test_file_that_cannot_be_written_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = doctor.Options(collectives=False, json=tmp_path / "none" / "found.json")
    assert doctor.run(options, {}) == 1
    assert "failed: json file" in capsys.readouterr().out


def test_command_reads_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[doctor.Options] = []
    codes: list[int] = []

    def run(options: doctor.Options) -> int:
        seen.append(options)
        return 1

    monkeypatch.setattr(doctor, "run", run)
    monkeypatch.setattr(command.os, "_exit", codes.append)
    monkeypatch.setattr(command.faulthandler, "dump_traceback_later", lambda *args, exit: None)
    for flags in ("--shared-folder a --json b --no-collectives --expect-gpus 8", "--timeout 5"):
        args = cli.parse(["doctor", *flags.split()])
        args.run(args)
    assert seen == [
        doctor.Options(Path("a"), Path("b"), expect_gpus=8, collectives=False),
        doctor.Options(patience=5.0),
    ]
    assert codes == [1, 1]


@pytest.mark.parametrize("wrong", ["", "doctor --timeout 0", "doctor --timeout inf", "nurse"])
def test_wrong_command_lines(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(wrong.split())
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--help" in line


def test_command_ends_with_the_verdict(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "megatron_dion", "doctor", "--no-collectives"]
    line += ["--shared-folder", str(tmp_path / "none")]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "failed: shared folder" in ended.stdout.splitlines()[-1]
    assert "-> make it, writable for this user" in ended.stdout
