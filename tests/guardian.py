"""Nothing that a pytest process has started outlives it, however it ends.

Each process that is started with `exec` inherits a mark in its environment, and so do the processes
that it forks. A guardian waits for the end of the pytest process, even by SIGKILL, and then kills
every process that bears the mark.
"""

import os
import select
import signal
from contextlib import suppress
from pathlib import Path


def guard_this_process() -> None:
    """Mark what this process starts from now on, and fork the guardian of it."""
    guarded = os.getpid()
    mark = f"MEGATRON_DION_TESTS_{guarded}"
    os.environ[mark] = "1"
    if os.fork() == 0:
        try:
            os.setsid()  # Ctrl-C is for pytest alone
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _wait_for_end(guarded)
            while marked := _processes_with(mark):
                for process in marked:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
        finally:
            os._exit(0)


def _wait_for_end(process: int) -> None:
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [])


def _processes_with(mark: str) -> list[int]:
    """The processes with a variable in the environment with which they were started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if f"\0{mark}=".encode() in b"\0" + (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found
