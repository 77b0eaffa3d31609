"""What is told to the user in a line: mistakes, failures to save or load, and how a run goes."""

import contextlib
import os
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

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


@contextlib.contextmanager
def in_one_line(context: str) -> Iterator[None]:
    """Turns a library's objection, which would be a traceback on every rank, into our error."""
    try:
        yield
    except (AssertionError, ImportError, OSError, ValueError, struct.error) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        message = " ".join(str(error).split()) or line  # many assertions have no message
        raise ConfigurationError(f"{context}: {message}") from error


def exit_with(error: Exception) -> NoReturn:
    """Print the error once for all processes and exit: with code 1 if the run had begun, else 2.

    Rank 0 speaks. The others must not exit before it, or their launcher would kill it unheard. A
    rank that is still alive after a while has an error that rank 0 has not, and speaks itself.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(_LAUNCHER_GRACE_SECONDS)
    tell(error)
    sys.exit(1 if isinstance(error, SaveError) else 2)
