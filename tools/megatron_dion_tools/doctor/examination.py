"""The examination: which checks are made, in which order, and what becomes of them.

No wait is without an end. A rank whose check hangs goes on after a while and says so to rank 0,
which waits longer than that.
"""

import argparse
import json
import queue
import socket
import threading
import time
from collections.abc import Mapping
from functools import partial

from megatron_dion.error_line import tell
from megatron_dion_tools.doctor import checks, collectives
from megatron_dion_tools.doctor.checks import FAILED, OK, WARNING, Check, Finding
from megatron_dion_tools.doctor.mailbox import LostError, Mailbox
from megatron_dion_tools.doctor.report import Row, merge, ranges, table, worst


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Examine this rank and what is between all ranks; rank 0 prints one table.

    `environ` describes the ranks, as torchrun does. The exit code is the same on all ranks: 0 if
    training can go on, else 1.
    """
    try:
        return _examine_rank(args, environ)
    except LostError as error:
        tell(f"rank {environ.get('RANK', '0')}: {error}")
        return 1


def _examine_rank(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    mailbox = Mailbox({} if args.no_collectives else environ, seconds=2 * args.timeout)
    own: dict[str, Check] = {
        "packages": checks.packages,
        "torch": checks.pytorch,
        "megatron": checks.megatron,
        "transformer-engine": checks.transformer_engine,
        "other kernels": checks.kernels,
        "limits": checks.limits,
    }
    if environ.get("LOCAL_RANK", "0") == "0":  # all ranks of a machine would find the same
        own["gpus"] = partial(checks.gpus, args.expect_gpus)
        own["shared memory"] = checks.shared_memory
    findings = examine(own, args.timeout / 2)
    together: dict[str, Check] = {
        "process group": partial(collectives.open_group, mailbox, args.timeout),
        "all_reduce": partial(collectives.all_reduce, mailbox.rank, mailbox.size),
        "messages": partial(collectives.messages, mailbox.rank, mailbox.size),
    }
    for name, check in ({} if args.no_collectives else together).items():
        findings |= examine({name: check}, args.timeout)
        if not findings[name].ended:
            break  # nobody can use the process group any more
    answers = mailbox.collect("report", json.dumps([socket.gethostname(), findings]))
    code = _conclude(answers, mailbox, environ) if mailbox.rank == 0 else 0
    code = int(mailbox.tell_all("verdict", str(code)))
    # Rank 0, which may host the store, stays until all others have read the verdict.
    mailbox.collect("end", "")
    return code


def examine(checks: Mapping[str, Check], seconds: float) -> dict[str, Finding]:
    """Run checks at the same time, so many seconds at most, and return their findings by name.

    A check may hang, as everything does that asks a dead file server or a stuck GPU. It is left
    behind in a daemon thread, which does not hold up the end of the process.
    """
    answers = {name: queue.SimpleQueue[Finding]() for name in checks}
    for name, check in checks.items():
        threading.Thread(target=_answer, args=(check, answers[name]), daemon=True).start()
    deadline = time.monotonic() + seconds
    findings = {}
    for name, answer in answers.items():
        try:
            findings[name] = answer.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            text, fix = f"no end within {seconds:g} s", "look on that node what the check waits for"
            findings[name] = Finding(FAILED, text, fix, ended=False)
    return findings


def _answer(check: Check, answer: queue.SimpleQueue[Finding]) -> None:
    try:
        answer.put(check())
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        answer.put(Finding(FAILED, text, ended=False))


def _conclude(answers: Mapping[int, str], mailbox: Mailbox, environ: Mapping[str, str]) -> int:
    """On rank 0: print the table and return the exit code."""
    hosts, findings = {}, {}
    for rank, text in answers.items():
        hosts[rank], own = json.loads(text)
        findings[rank] = {name: Finding(*values) for name, values in own.items()}
    rows = [Row("ranks", list(hosts), _attendance(mailbox, hosts, environ)), *merge(findings)]
    print(table(rows), flush=True)
    return int(worst(rows) == FAILED)


def _attendance(mailbox: Mailbox, hosts: Mapping[int, str], environ: Mapping[str, str]) -> Finding:
    if absent := set(range(mailbox.size)) - set(hosts):
        text = f"rank {ranges(absent)} sent no report within {mailbox.seconds:g} s"
        fix = "see its log; can its node reach MASTER_ADDR:MASTER_PORT? --timeout waits longer"
        return Finding(FAILED, text, fix)
    tasks = environ.get("SLURM_NTASKS", "1")
    if mailbox.size == 1 and tasks != "1" and "RANK" not in environ:
        fix = "set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or let srun start torchrun"
        return Finding(WARNING, f"one process, but Slurm has started {tasks} tasks", fix)
    return Finding(OK, f"{mailbox.size} on {len(set(hosts.values()))} node(s)")
