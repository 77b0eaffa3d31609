"""Mistakes of the user of a command, told in one line."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class ToolError(Exception):
    """A mistake in what the user gave, told in one line."""


def run_tool(name: str, main: Callable[[], int | None]) -> NoReturn:
    """Run a command and end the process, with one line on stderr and code 1 after a mistake.

    Where nobody reads the output any more (`| head`), it ends without a word.

    Args:
        name: What the line begins with.
        main: Returns the exit code. It raises `ToolError`, `OSError` for a file it cannot use, or
            `ModuleNotFoundError` for an optional package.
    """
    try:
        _run_to_the_end(name, main)
    finally:
        _flush_to_whoever_reads()


def _run_to_the_end(name: str, main: Callable[[], int | None]) -> NoReturn:
    try:
        sys.exit(main())
    except ToolError as error:
        reason = str(error)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        reason = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
    except ModuleNotFoundError as error:
        if (error.name or "megatron_dion").startswith("megatron_dion"):
            raise
        reason = f"it needs the package {error.name}: pip install 'megatron-dion[run,data]'"
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(f"{name}: error: {reason}")


def _flush_to_whoever_reads() -> None:
    """Python would do it at the very end, and complain where `| head` has read enough."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
