"""Make one HTML page about a run from its run directory."""

import argparse
import sys
from pathlib import Path

from megatron_dion.report.folder import ReportError, read_folder
from megatron_dion.report.page import render
from megatron_dion.training.run_directory import replace_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="what was given to pretrain_gpt.py's --run-dir",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="by default report.html in the run directory"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page.

    Returns:
        The exit code: 2 where there is no run to report on, or no place to write to.
    """
    output = args.output or args.run_dir / "report.html"
    try:
        replace_file(output, render(read_folder(args.run_dir)))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}: name another file with --output", file=sys.stderr)
        return 2
    print(f"wrote {output}, {output.stat().st_size / 1000:.0f} kB: open it in a browser")
    return 0
