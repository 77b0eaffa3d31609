"""Make one HTML page about a run from its run directory."""

import argparse
from pathlib import Path

from megatron_dion_tools.errors import ToolError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    run_dir = "what was given to pretrain_gpt.py's --run-dir"
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=run_dir)
    output = "the page; by default report.html in the run directory"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    from megatron_dion.megatron.run_directory import replace_file
    from megatron_dion_tools.report.folder import read_folder
    from megatron_dion_tools.report.page import render

    output = args.output or args.run_dir / "report.html"
    page = render(read_folder(args.run_dir))
    try:
        replace_file(output, page)
    except OSError as error:
        raise ToolError(f"{error}: name another file with --output") from error
    print(f"wrote {output}, {output.stat().st_size / 1000:.0f} kB: open it in a browser")
