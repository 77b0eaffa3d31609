"""Mistakes of the user, and failures to save or load, reported as one line."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from megatron_dion.checkpointing.errors import CheckpointError, SaveError
from megatron_dion.error_line import tell

# Time for the launcher to end the other processes once the one that speaks has exited.
_LAUNCHER_GRACE_SECONDS = 20.0


class ConfigurationError(Exception):
    """The run cannot start as it was asked for; the message names what to change."""


# What ends a run with one line and no traceback.
TOLD_IN_ONE_LINE = (ConfigurationError, CheckpointError)


def exit_with(error: Exception) -> NoReturn:
    """Print the error once for all processes and exit: with code 1 if the run had begun, else 2.

    Rank 0 speaks. The others must not exit before it: their launcher would kill it unheard. One
    that is still alive after a while has an error that rank 0 has not, and says it itself.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(_LAUNCHER_GRACE_SECONDS)
    _tell_launcher(tell(error))
    sys.exit(1 if isinstance(error, SaveError) else 2)


def _tell_launcher(line: str) -> None:
    """Let torchrun end its report with the line; what is in this file it shows as a traceback."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        details = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": details}))
