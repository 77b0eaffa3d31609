"""The finding of a check, and a way to run checks that neither hangs nor raises."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

OK, WARNING, FAILED = VERDICTS = ("ok", "warning", "failed")  # the worst is last


class Finding(NamedTuple):
    """What one check says on one rank.

    Attributes:
        verdict: `OK`; `WARNING`, if training can go on, slower or with less than it could have;
            `FAILED`, if training cannot go on, or its results cannot be trusted.
        text: What there is, in a few words.
        fix: What to do about it; empty if nothing has to be done.
        same: All ranks must find the same text.
        ended: False for a check that raised or took too long. Later checks cannot use what such a
            check shares with them, for example a process group.
    """

    verdict: str
    text: str
    fix: str = ""
    same: bool = False
    ended: bool = True


Check = Callable[[], Finding]


def examine(checks: Mapping[str, Check], seconds: float) -> dict[str, Finding]:
    """Run checks at the same time and return their findings by name.

    A check may hang, as everything does that asks a dead file server or a stuck GPU. It is left
    behind in a daemon thread, which does not hold up the end of the process.

    Args:
        checks: By name.
        seconds: How long all of them together may take.
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
