"""The examination: which checks are made, in which order, and what becomes of them.

No wait is without an end: each check has half the patience of the wait that follows it, so that a
rank with a check that hangs still comes and says so.
"""

import functools
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dion_tools.doctor import (
    clocks,
    collectives,
    gpus,
    links,
    machine,
    shared_folder,
    software,
)
from megatron_dion_tools.doctor.findings import (
    Check,
    Finding,
    Verdict,
    examine,
    failed,
    ok,
    warning,
)
from megatron_dion_tools.doctor.report import RankReport, Row, merge, row_of, table, to_json, worst
from megatron_dion_tools.doctor.world import LostError, World, alone, join


@dataclass(frozen=True)
class Options:
    """What to examine.

    Attributes:
        shared_folder: That all ranks should see; None to check none.
        json: A file to write the findings to; None to write none.
        run_dir: Where checkpoints and logs will go.
        expect_gpus: Of one machine; None if that is not known.
        collectives: Let ranks talk to each other; otherwise each one examines itself alone.
        patience: Seconds to wait for other ranks.
    """

    shared_folder: Path | None = None
    json: Path | None = None
    run_dir: Path = Path()
    expect_gpus: int | None = None
    collectives: bool = True
    patience: float = 60.0

    @property
    def limit(self) -> float:
        """Seconds that one check may take."""
        return self.patience / 2


def run(options: Options, environ: Mapping[str, str] = os.environ) -> int:
    """Examine this rank and, together with all others, what is between them; print one table.

    Args:
        options: What to examine.
        environ: Describes the ranks, as torchrun does.

    Returns:
        The exit code, the same on all ranks: 0 if training can go on, else 1.
    """
    try:
        world = join(environ, options.patience) if options.collectives else alone(options.patience)
        world.meet("start")
        report = RankReport(socket.gethostname())
        _examine_alone(report, options, environ)
        _examine_together(report, options, world)
        reports = world.gather("report", report.to_json())
        return world.dismiss(_conclude(reports, options, world, environ) if reports else 1)
    except LostError as error:
        print(f"doctor: rank {environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        return 1


def _examine_alone(report: RankReport, options: Options, environ: Mapping[str, str]) -> None:
    checks = _process_checks()
    if environ.get("LOCAL_RANK", "0") == "0":
        checks |= _machine_checks(options)
    for name, check in checks.items():
        report.findings.append(examine(name, check, options.limit))


def _process_checks() -> dict[str, Check]:
    # GPUs are counted inside of checks: a broken driver may not answer.
    return {
        "python": software.python,
        "torch": software.pytorch,
        "megatron-core": software.megatron_core,
        "transformer-engine": lambda: software.transformer_engine(gpus.count_gpus()),
        "apex": software.apex,
        "nccl": lambda: software.nccl(gpus.count_gpus()),
        "optional kernels": software.optional_kernels,
        "open files": machine.open_files,
        "locked memory": lambda: machine.locked_memory(gpus.count_gpus()),
    }


def _machine_checks(options: Options) -> dict[str, Check]:
    """What is the same for all processes of a machine, so that one of them will do."""
    return {
        "gpus": lambda: gpus.gpus(gpus.count_gpus(), options.expect_gpus, gpus.read_gpus()),
        "gpu clocks": lambda: gpus.gpu_clocks(gpus.read_gpus()),
        "shared memory": machine.shared_memory,
        "disk": functools.partial(machine.disk, options.run_dir),
    }


def _examine_together(report: RankReport, options: Options, world: World) -> None:
    if not world.meet("the checks of all ranks"):
        return
    report.clock = time.time()  # all ranks leave the meeting at the same moment
    if options.shared_folder is not None:
        report.findings.append(_examine_shared_folder(options.shared_folder, options, world))
    if options.collectives and world.meet("collectives"):
        _examine_collectives(report, options, world)


def _examine_shared_folder(folder: Path, options: Options, world: World) -> Finding:
    def step(function: Callable[[Path, str], Finding], word: str) -> Finding:
        return examine("shared folder", functools.partial(function, folder, word), options.limit)

    if world.rank == 0:
        word = uuid.uuid4().hex
        written = step(shared_folder.write, word)
        world.tell("shared word", word)
    else:
        word = world.hear("shared word")
    finding = step(shared_folder.read, word)
    world.meet("the end of reading")
    if world.rank == 0:
        step(shared_folder.remove, word)
        return finding if written.verdict is Verdict.OK else written
    return finding


def _examine_collectives(report: RankReport, options: Options, world: World) -> None:
    checks: dict[str, Check] = {
        "process group": functools.partial(collectives.open_group, world),
        "all_reduce": functools.partial(collectives.all_reduce, world),
        "all_gather": functools.partial(collectives.all_gather, world),
        "messages": functools.partial(links.exchange, world, report.links),
    }
    for name, check in checks.items():
        finding = examine(name, check, options.limit)
        report.findings.append(finding)
        if finding.aborted:
            return  # the group cannot be used, not even ended
    examine("end", collectives.close_group, options.limit)


def _conclude(
    answers: Mapping[int, str], options: Options, world: World, environ: Mapping[str, str]
) -> int:
    """On rank 0: prints the table, writes the file, tells the exit code."""
    reports = {rank: RankReport.from_json(text) for rank, text in answers.items()}
    rows = [*_rows_about_all(reports, world, environ), *merge(reports)]
    if options.json is not None:
        write = functools.partial(_write, options.json, to_json(rows, reports))
        rows.append(row_of(examine("json file", write, options.limit), [world.rank]))
    print(table(rows), flush=True)
    return 1 if worst(rows) is Verdict.FAILED else 0


def _rows_about_all(
    reports: Mapping[int, RankReport], world: World, environ: Mapping[str, str]
) -> list[Row]:
    hosts = {rank: report.host for rank, report in reports.items()}
    times = {rank: one.clock for rank, one in reports.items() if one.clock is not None}
    timed = [link for report in reports.values() for link in report.links]
    measured = [link for link in timed if link.second in hosts]  # it may have vanished since
    findings = {"ranks": attendance(world, hosts, environ)}
    if len(times) > 1:
        findings["clocks"] = clocks.judge(times, hosts)
    if measured:
        findings["links"] = links.judge(measured, hosts)
    return [row_of(replace(one, name=name), world.present) for name, one in findings.items()]


def attendance(world: World, hosts: Mapping[int, str], environ: Mapping[str, str]) -> Finding:
    """Did all ranks come, and are they the ranks that the job has?

    Args:
        world: As rank 0 sees it in the end.
        hosts: The machine of each rank that came.
        environ: The variables that launchers set.
    """
    if world.absent:
        return failed(
            world.roll_call(),
            "see their logs; can their nodes reach MASTER_ADDR:MASTER_PORT? --timeout waits longer",
        )
    tasks = environ.get("SLURM_NTASKS", "1")
    if world.size == 1 and tasks != "1" and "RANK" not in environ:
        return warning(
            f"one process, but a task of {tasks} of Slurm's",
            "set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or let srun start torchrun",
        )
    return ok(f"{world.size} on {len(set(hosts.values()))} node(s)")


def _write(file: Path, text: str) -> Finding:
    file.write_text(text, encoding="utf-8")
    return ok(f"{file}")
