"""What is told to the user in a line: mistakes, failures to save or load, and how a run goes."""

import os
import struct
import sys
import time
from contextlib import AbstractContextManager
from typing import NoReturn

from megatron_dion.checkpointing import errors
from megatron_dion.checkpointing.errors import CheckpointError, SaveError
from megatron_dion.error_line import tell

# Time for the launcher to end the other processes once the one that speaks has exited.
_LAUNCHER_GRACE_SECONDS = 20.0


class ConfigurationError(Exception):
    """The run cannot start as the command line asks; the message names what to change."""


# What ends a run with one line and no traceback.
ONE_LINE_ERRORS = (ConfigurationError, CheckpointError)


def say(text: str) -> None:
    """Print lines of the project's own, once for all processes, beside what Megatron prints."""
    for line in text.splitlines() if os.environ.get("RANK", "0") == "0" else ():
        print(f"[dion] {line}", flush=True)


def refuse(line: str, when: object) -> None:
    """Raises ConfigurationError with a line where a condition is true."""
    if when:
        raise ConfigurationError(line)


def in_one_line(context: str) -> AbstractContextManager[None]:
    """Turns a library's objection, which would be a traceback on every rank, into our error."""
    causes = (AssertionError, ImportError, OSError, ValueError, struct.error)
    return errors.in_one_line(ConfigurationError, context, *causes)


def exit_with(error: Exception) -> NoReturn:
    """Print the error once for all processes and exit: with code 1 if the run had begun, else 2.

    Rank 0 speaks. The others must not exit before it, or their launcher would kill it unheard. A
    rank that is still alive after a while has an error that rank 0 has not, and speaks itself.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(_LAUNCHER_GRACE_SECONDS)
    tell(error)
    sys.exit(1 if isinstance(error, SaveError) else 2)
