"""The examination: which checks are made, in which order, and what becomes of them.

No wait is without an end. Checks have half the seconds that rank 0 waits for other ranks, so that
a rank with a check that hangs still comes to the next meeting and says so.
"""

import argparse
import json
import socket
import time
import uuid
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from megatron_dion.error_line import tell
from megatron_dion_tools.doctor import collectives, gpus, machine, software
from megatron_dion_tools.doctor.collectives import Link
from megatron_dion_tools.doctor.findings import FAILED, OK, WARNING, Check, Finding, examine
from megatron_dion_tools.doctor.report import Row, merge, table, worst
from megatron_dion_tools.doctor.world import LostError, World

TOLERATED_SKEW = 1.0  # seconds; with more, files and log lines of several nodes do not sort


class RankReport(NamedTuple):
    """What one rank sends to rank 0.

    Attributes:
        host: The name of its machine.
        clock: Its time in seconds at the moment when all ranks had met.
        findings: By the name of the check.
        links: The links that this rank has timed.
    """

    host: str
    clock: float
    findings: dict[str, Finding]
    links: list[Link]

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        """Read what `json.dumps` wrote."""
        host, clock, findings, links = json.loads(text)
        findings = {name: Finding(*values) for name, values in findings.items()}
        return cls(host, clock, findings, [Link(*values) for values in links])


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Examine this rank and what is between all ranks; rank 0 prints one table.

    Args:
        args: The flags of the command.
        environ: Describes the ranks, as torchrun does.

    Returns:
        The exit code, the same on all ranks: 0 if training can go on, else 1.
    """
    try:
        return _examine(args, environ)
    except LostError as error:
        tell(f"rank {environ.get('RANK', '0')}: {error}")
        return 1


def _examine(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    seconds = args.timeout / 2
    world = World({} if args.no_collectives else environ, args.timeout)
    # A new name: the client of a file server may remember for a minute that a file is absent.
    word = world.meet("start", uuid.uuid4().hex)[0]
    file = args.shared_folder / f".doctor-{word}" if args.shared_folder else None
    checks = _own_checks(args, is_first_of_machine=environ.get("LOCAL_RANK", "0") == "0")
    if file and world.rank == 0:
        checks["shared folder"] = partial(machine.write, file)
    findings = examine(checks, seconds)
    world.meet("the checks of all ranks")
    report = RankReport(socket.gethostname(), time.time(), findings, [])
    if file and findings.get("shared folder", Finding(OK, "")).verdict == OK:
        findings |= examine({"shared folder": partial(machine.read, file)}, seconds)
    if world.is_complete and not args.no_collectives:
        _examine_together(world, report, seconds)
    answers = world.meet("report", json.dumps(report))
    if file and world.rank == 0:
        examine({"end": partial(machine.remove, file)}, seconds)
    code = _conclude(answers, world, environ) if world.rank == 0 else 0
    code = int(world.meet("verdict", str(code))[0])
    world.leave()
    return code


def _own_checks(args: argparse.Namespace, is_first_of_machine: bool) -> dict[str, Check]:
    checks: dict[str, Check] = {
        "packages": software.packages,
        "torch": software.pytorch,
        "megatron-core": software.megatron_core,
        "transformer-engine": software.transformer_engine,
        "apex": software.apex,
        "limits": machine.limits,
    }
    if is_first_of_machine:  # all ranks of a machine would find the same
        checks |= {
            "gpus": partial(gpus.gpus, args.expect_gpus),
            "shared memory": machine.shared_memory,
            "disk": partial(machine.disk, args.run_dir),
        }
    return checks


def _examine_together(world: World, report: RankReport, seconds: float) -> None:
    checks: dict[str, Check] = {
        "process group": partial(collectives.open_group, world),
        "all_reduce": partial(collectives.all_reduce, world),
        "messages": partial(collectives.messages, world, report.links),
    }
    for name, check in checks.items():
        report.findings.update(examine({name: check}, seconds))
        if not report.findings[name].ended:
            return  # nobody can use the group any more


def _conclude(answers: Mapping[int, str], world: World, environ: Mapping[str, str]) -> int:
    """On rank 0: print the table and return the exit code."""
    reports = {rank: RankReport.from_json(text) for rank, text in answers.items()}
    hosts = {rank: report.host for rank, report in reports.items()}
    links = [link for report in reports.values() for link in report.links]
    about_all = {"ranks": _attendance(world, hosts, environ)}
    if world.size > 1 and world.is_complete:
        clocks = {rank: report.clock for rank, report in reports.items()}
        about_all["clocks"] = judge_clocks(clocks, hosts)
        about_all["links"] = collectives.judge_links(links, hosts)
    rows = [Row(name, world.present, finding) for name, finding in about_all.items()]
    rows += merge({rank: report.findings for rank, report in reports.items()})
    print(table(rows), flush=True)
    return int(worst(rows) == FAILED)


def _attendance(world: World, hosts: Mapping[int, str], environ: Mapping[str, str]) -> Finding:
    if not world.is_complete:
        fix = "see its log; can its node reach MASTER_ADDR:MASTER_PORT? --timeout waits longer"
        return Finding(FAILED, world.roll_call(), fix)
    tasks = environ.get("SLURM_NTASKS", "1")
    if world.size == 1 and tasks != "1" and "RANK" not in environ:
        fix = "set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or let srun start torchrun"
        return Finding(WARNING, f"one process, but Slurm has started {tasks} tasks", fix)
    return Finding(OK, f"{world.size} on {len(set(hosts.values()))} node(s)")


def judge_clocks(clocks: Mapping[int, float], hosts: Mapping[int, str]) -> Finding:
    """Compare the times in seconds that all ranks read at the same moment.

    Args:
        clocks: By rank. The moment is as exact as a message that reaches all ranks.
        hosts: The machine of each rank.
    """
    slow, fast = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
    skew = clocks[fast] - clocks[slow]
    if skew <= TOLERATED_SKEW:
        return Finding(OK, f"within {skew:.2g} s")
    text = f"rank {fast} on {hosts[fast]} is {skew:.2g} s ahead of rank {slow} on {hosts[slow]}"
    return Finding(WARNING, text, "start chrony or ntpd on all nodes")
