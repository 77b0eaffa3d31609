"""Mistakes of the user of a command, told in one line."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_dion.error_line import exit_interrupted, tell

_READER_HAS_ENDED = 141  # what a shell says of a program that SIGPIPE has ended


class ToolError(Exception):
    """A mistake in what the user gave, told in one line."""


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and end the process, with one line on stderr and code 2 after a mistake.

    Args:
        main: Returns the exit code. It raises `ToolError`, `OSError` for a file it cannot use, or
            `ModuleNotFoundError` for an optional package.
    """
    try:
        code = _code_of(main)
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        # Who read the output, say `head`, has ended. At its end Python would write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_READER_HAS_ENDED)
    except ToolError as error:
        reason = str(error)
    except OSError as error:
        reason = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
    except ModuleNotFoundError as error:
        if (error.name or "megatron_dion").startswith("megatron_dion"):
            raise
        reason = f"it needs the package {error.name}: pip install 'megatron-dion[run,data]'"
    except KeyboardInterrupt:
        exit_interrupted()
    tell(reason)
    sys.exit(2)


def _code_of(main: Callable[[], int | None]) -> int | str | None:
    """After --help argparse ends the process, and what it wrote is still to be flushed."""
    try:
        return main()
    except SystemExit as end:
        return end.code
