"""Make one HTML page about runs, the first of which is what the others are compared with."""

import argparse
from pathlib import Path

from megatron_dion_tools.errors import ToolError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    run_dir = "what was given to pretrain_gpt.py's --run-dir"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=run_dir)
    output = "the page; by default report.html in the first run's directory"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    png = "also write the losses and the answer as a picture"
    parser.add_argument("--png", type=Path, metavar="FILE", help=png)


def run(args: argparse.Namespace) -> None:
    """Write the page, and the picture."""
    from megatron_dion_tools.report.folder import read_folder
    from megatron_dion_tools.report.page import Report

    report = Report([read_folder(path) for path in args.runs])
    output = args.output or args.runs[0] / "report.html"
    files = {output: report.page().encode()} | ({args.png: report.png()} if args.png else {})
    for path, content in files.items():
        try:
            path.write_bytes(content)
        except OSError as error:
            raise ToolError(f"{error}: name another file with --output or --png") from error
        print(f"wrote {path}, {len(content) / 1000:.0f} kB")
