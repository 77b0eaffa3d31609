"""What a check found, and a way to run checks that neither hang nor raise."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum


class Verdict(StrEnum):
    """Whether training can go on with what was found; a later one is worse."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"

    @property
    def badness(self) -> int:
        """For comparisons: 0 is good."""
        return list(Verdict).index(self)


@dataclass(frozen=True)
class Finding:
    """What one check found on one rank.

    Attributes:
        verdict: Whether it will do.
        found: What there is, in a few words.
        fix: What to do about it; empty if nothing has to be done.
        alike: It must be the same on all ranks, word for word.
        aborted: The check did not come to its end: what it shares with later ones may be unusable.
        name: Of the check; `examine` fills it in.
    """

    verdict: Verdict
    found: str
    fix: str = ""
    alike: bool = False
    aborted: bool = False
    name: str = ""


Check = Callable[[], Finding]


def ok(found: str, *, alike: bool = False) -> Finding:
    """Nothing has to be done."""
    return Finding(Verdict.OK, found, alike=alike)


def warning(found: str, fix: str) -> Finding:
    """Training may go on, slower or with less than it could."""
    return Finding(Verdict.WARNING, found, fix)


def failed(found: str, fix: str) -> Finding:
    """Training cannot go on, or its results cannot be trusted."""
    return Finding(Verdict.FAILED, found, fix)


def examine(name: str, check: Check, seconds: float) -> Finding:
    """Run a check; one that raises or does not end is a failure of its own.

    Args:
        name: Of the check.
        check: It may hang, as everything does that asks a dead file server or a stuck GPU. It is
            left behind then, in a thread that does not hold up the end of the process.
        seconds: How long it may take.
    """
    answers = queue.SimpleQueue[Finding]()
    threading.Thread(target=lambda: answers.put(_without_raising(check)), daemon=True).start()
    try:
        finding = answers.get(timeout=seconds)
    except queue.Empty:
        finding = _aborted(f"no end within {seconds:g} s", "see on the node what it waits for")
    return replace(finding, name=name)


def _without_raising(check: Check) -> Finding:
    try:
        return check()
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return _aborted(f"{type(error).__name__}: {first_line}", "see the log of that rank")


def _aborted(found: str, fix: str) -> Finding:
    return Finding(Verdict.FAILED, found, fix, aborted=True)
