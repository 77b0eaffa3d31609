"""Mistakes of the user of a command, told in one line."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_dion.error_line import exit_interrupted, tell

MISTAKE = 2
READER_HAS_ENDED = 141  # a shell's exit code of a program that SIGPIPE ends


class ToolError(Exception):
    """A mistake in what the user gave, told in one line."""


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and end the process, with one line on stderr and code 2 after a mistake.

    A mistake is a `ToolError`, an `OSError` for a file that it cannot use, or a
    `ModuleNotFoundError` for an optional package.
    """
    try:
        try:
            code: int | str | None = main()
        except SystemExit as end:  # of argparse after --help, whose text is still to be flushed
            code = end.code
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        # The reader of the output, say `head`, has ended. Python would write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_HAS_ENDED)
    except ToolError as error:
        tell(error)
    except OSError as error:
        tell(error if error.filename is None else f"{error.filename}: {error.strerror}")
    except ModuleNotFoundError as error:
        if (error.name or "megatron_dion").startswith("megatron_dion"):
            raise
        tell(f"it needs the package {error.name}: pip install 'megatron-dion[run,data]'")
    except KeyboardInterrupt:
        exit_interrupted()
    sys.exit(MISTAKE)
