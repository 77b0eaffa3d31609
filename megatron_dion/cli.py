"""The command `megatron-dion`."""

import argparse
import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dion.diagnostics import advisor
from megatron_dion.report import command as report

# The doctor's time as a multiple of what it waits for a rank; it has about ten such waits.
_LONGEST = 15


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand and end the process with its exit code.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    args = _parser().parse_args(argv)
    code = args.run(args)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: a thread that hangs in a library could hold up the interpreter's end.
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-dion", description="Dion on Megatron-core.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_advise(commands)
    _add_report(commands)
    return parser


def _add_advise(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "advise", help="which rank would have captured 90 %%", description=advisor.DESCRIPTION
    )
    advisor.add_arguments(parser)
    parser.set_defaults(run=advisor.run)


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="examine this machine, or all ranks of a job",
        description="Examine this machine or, started on all ranks by torchrun or srun, all of"
        " them and what is between them. Exit code 0: fit to train, perhaps with warnings.",
    )
    add = doctor.add_argument
    add("--shared-folder", type=Path, metavar="DIR", help="which all ranks should see")
    add("--json", type=Path, metavar="FILE", help="write the findings to a file as well")
    add("--no-collectives", action="store_true", help="this process alone, no talk between ranks")
    add("--run-dir", type=Path, default=Path(), metavar="DIR", help="is there enough free disk?")
    add("--expect-gpus", type=int, metavar="N", help="GPUs that each machine must have")
    add("--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="wait for ranks (60)")
    doctor.set_defaults(run=_run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    # Only now: it imports torch's distributed part and what the doctor looks at.
    from megatron_dion.health.doctor import Options, run

    # For what no other limit covers, such as a name server that does not answer.
    faulthandler.dump_traceback_later(_LONGEST * args.timeout, exit=True)
    return run(
        Options(
            shared_folder=args.shared_folder,
            json=args.json,
            run_dir=args.run_dir,
            expect_gpus=args.expect_gpus,
            collectives=not args.no_collectives,
            patience=args.timeout,
        )
    )


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="make a page about a run",
        description="Make one HTML page, which needs nothing else, from the files of a run.",
    )
    report.add_arguments(parser)
    parser.set_defaults(run=report.run)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


if __name__ == "__main__":
    main()
