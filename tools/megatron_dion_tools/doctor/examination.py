"""The examination: which checks are made, in which order, and what becomes of them.

No wait is without an end. A rank whose check hangs goes on after a while and says so to rank 0,
which waits longer than that.
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
from megatron_dion_tools.doctor.mailbox import LostError, Mailbox
from megatron_dion_tools.doctor.report import Row, merge, ranges, table, worst

TOLERATED_SKEW = 1.0  # seconds; with more, files and log lines of several nodes do not sort


class RankReport(NamedTuple):
    """What one rank sends to rank 0.

    Attributes:
        host: The name of its machine.
        findings: By the name of the check.
        clock: Its time in seconds when it left the first collective, together with all others.
        links: The links that this rank has timed.
    """

    host: str
    findings: dict[str, Finding]
    clock: float | None
    links: list[Link]

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        """Read what `json.dumps` wrote."""
        host, findings, clock, links = json.loads(text)
        findings = {name: Finding(*values) for name, values in findings.items()}
        return cls(host, findings, clock, [Link(*values) for values in links])


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Examine this rank and what is between all ranks; rank 0 prints one table.

    Args:
        args: The flags of the command.
        environ: Describes the ranks, as torchrun does.

    Returns:
        The exit code, the same on all ranks: 0 if training can go on, else 1.
    """
    try:
        return _examine_rank(args, environ)
    except LostError as error:
        tell(f"rank {environ.get('RANK', '0')}: {error}")
        return 1


def _examine_rank(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    mailbox = Mailbox({} if args.no_collectives else environ, seconds=2 * args.timeout)
    # A new name: the client of a file server may remember for a minute that a file is absent.
    word = mailbox.tell_all("word", uuid.uuid4().hex)
    file = args.shared_folder / f".doctor-{word}" if args.shared_folder else None
    checks = _own_checks(args, is_first_of_machine=environ.get("LOCAL_RANK", "0") == "0")
    if file and mailbox.rank == 0:
        checks["shared folder"] = partial(machine.write, file)
    findings = examine(checks, args.timeout / 2)
    report = RankReport(socket.gethostname(), findings, None, [])
    is_written = findings.get("shared folder", Finding(OK, "")).verdict == OK
    together = {} if args.no_collectives else _checks_of_all(mailbox, report, args.timeout)
    if file and is_written:
        together["shared folder"] = partial(machine.read, file)
    for name, check in together.items():
        findings |= examine({name: check}, args.timeout)
        if not findings[name].ended:
            break  # nobody can use the process group any more
        if name == "all_reduce":
            report = report._replace(clock=time.time())
    answers = mailbox.collect("report", json.dumps(report))
    code = _conclude(answers, mailbox, environ) if mailbox.rank == 0 else 0
    if file and mailbox.rank == 0:
        file.unlink(missing_ok=True)
    code = int(mailbox.tell_all("verdict", str(code)))
    # Rank 0, which may host the store, stays until all others have read the verdict.
    mailbox.collect("end", "")
    return code


def _own_checks(args: argparse.Namespace, is_first_of_machine: bool) -> dict[str, Check]:
    checks: dict[str, Check] = {
        "packages": software.packages,
        "torch": software.pytorch,
        "megatron": software.megatron,
        "transformer-engine": software.transformer_engine,
        "limits": machine.limits,
    }
    if is_first_of_machine:  # all ranks of a machine would find the same
        checks["gpus"] = partial(gpus.gpus, args.expect_gpus)
        checks["shared memory"] = machine.shared_memory
    return checks


def _checks_of_all(mailbox: Mailbox, report: RankReport, seconds: float) -> dict[str, Check]:
    return {
        "process group": partial(collectives.open_group, mailbox, seconds),
        "all_reduce": partial(collectives.all_reduce, mailbox.rank, mailbox.size),
        "messages": partial(collectives.messages, mailbox.rank, mailbox.size, report.links),
    }


def _conclude(answers: Mapping[int, str], mailbox: Mailbox, environ: Mapping[str, str]) -> int:
    """On rank 0: print the table and return the exit code."""
    reports = {rank: RankReport.from_json(text) for rank, text in answers.items()}
    hosts = {rank: report.host for rank, report in reports.items()}
    clocks = {rank: one.clock for rank, one in reports.items() if one.clock is not None}
    links = [link for one in reports.values() for link in one.links if link.second in hosts]
    about_all = {"ranks": _attendance(mailbox, hosts, environ)}
    if len(clocks) > 1:
        about_all["clocks"] = judge_clocks(clocks, hosts)
    if links:
        about_all["links"] = collectives.judge_links(links, hosts)
    rows = [Row(name, list(reports), finding) for name, finding in about_all.items()]
    rows += merge({rank: report.findings for rank, report in reports.items()})
    print(table(rows), flush=True)
    return int(worst(rows) == FAILED)


def _attendance(mailbox: Mailbox, hosts: Mapping[int, str], environ: Mapping[str, str]) -> Finding:
    absent = set(range(mailbox.size)) - set(hosts)
    if absent:
        text = f"rank {ranges(absent)} sent no report within {mailbox.seconds:g} s"
        fix = "see its log; can its node reach MASTER_ADDR:MASTER_PORT? --timeout waits longer"
        return Finding(FAILED, text, fix)
    tasks = environ.get("SLURM_NTASKS", "1")
    if mailbox.size == 1 and tasks != "1" and "RANK" not in environ:
        fix = "set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or let srun start torchrun"
        return Finding(WARNING, f"one process, but Slurm has started {tasks} tasks", fix)
    return Finding(OK, f"{mailbox.size} on {len(set(hosts.values()))} node(s)")


def judge_clocks(clocks: Mapping[int, float], hosts: Mapping[int, str]) -> Finding:
    """Compare the times in seconds that all ranks read at the same moment.

    Args:
        clocks: By rank. The moment is as exact as a collective that reaches all ranks.
        hosts: The machine of each rank.
    """
    slow, fast = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
    skew = clocks[fast] - clocks[slow]
    if skew <= TOLERATED_SKEW:
        return Finding(OK, f"within {skew:.2g} s")
    text = f"rank {fast} on {hosts[fast]} is {skew:.2g} s ahead of rank {slow} on {hosts[slow]}"
    return Finding(WARNING, text, "start chrony or ntpd on all nodes")
