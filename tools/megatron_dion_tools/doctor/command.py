"""Examine this machine or, started on all ranks by torchrun or srun, all of them.

What is between ranks is examined as well. Exit code 0: fit to train, perhaps with warnings.
"""

import argparse
import faulthandler
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    add = parser.add_argument
    add("--no-collectives", action="store_true", help="this process alone, no talk between ranks")
    add("--expect-gpus", type=int, metavar="N", help="GPUs that each machine must have")
    add("--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="wait for ranks (60)")


def run(args: argparse.Namespace) -> None:
    """Examine, and end the process with the verdict."""
    # Only now: it imports torch's distributed part and what the doctor looks at.
    from megatron_dion_tools.doctor import examination

    # For what no other limit covers, such as a name server that does not answer. An examination
    # has about ten waits of `--timeout` seconds.
    faulthandler.dump_traceback_later(15 * args.timeout, exit=True)
    code = examination.run(args, os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: a thread that hangs in a library could hold up the interpreter's end.
    os._exit(code)


def _seconds(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return float(text)
