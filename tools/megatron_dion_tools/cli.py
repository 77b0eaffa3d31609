"""The command `megatron-dion`: a table of subcommands.

A subcommand is a module with a docstring, which is its description, and two functions:

    add_arguments(parser: argparse.ArgumentParser) -> None
    run(args: argparse.Namespace) -> int | None

`run` returns the exit code (None for 0) and raises `megatron_dion_tools.errors.ToolError` for a
mistake of the user, which is told in one line with exit code 2. To add a subcommand, write the
module and add a line to `COMMANDS`. Only the module of the subcommand that was asked for is
imported; it imports torch, if it needs it, in `run`, so that `--help` is quick.

One that takes flags of pretrain_gpt.py after `--` declares `parser.set_defaults(flags=[])` and
finds them in `args.flags`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

from megatron_dion.misspelt import with_suggestion
from megatron_dion_tools.errors import ToolError, run_tool


class Command(NamedTuple):
    """A subcommand: its module, and what stands in the list of all."""

    module: str
    help: str


COMMANDS = {
    "doctor": Command("megatron_dion_tools.doctor.command", "examine this machine, or all ranks"),
    "data": Command("megatron_dion_tools.data.command", "corpus, tokenizer, datasets"),
    "plan": Command("megatron_dion_tools.plan.command", "plan a run of a large model"),
    "launch": Command("megatron_dion_tools.launch", "check a recipe and submit it to Slurm"),
    "inspect": Command("megatron_dion_tools.inspect", "what a checkpoint holds"),
    "convergence": Command("megatron_dion_tools.convergence.command", "do runs converge alike?"),
    "report": Command("megatron_dion_tools.report.command", "make a page about a run"),
    "study": Command(
        "megatron_dion_tools.studies.command", "run and report comparisons of optimizers"
    ),
}


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line here too; argparse would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ToolError(f"{with_suggestion(message, self)} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand and end the process with its exit code.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    words = sys.argv[1:] if argv is None else argv
    run_tool(lambda: call(words))


def call(argv: Sequence[str]) -> int | None:
    """Run a subcommand and return its exit code; mistakes are exceptions.

    Args:
        argv: The arguments after the program's name.
    """
    args = parse(argv)
    code: int | None = args.run(args)
    return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; `args.run` is the subcommand's function.

    Args:
        argv: The arguments after the program's name.
    """
    # After `--` argparse takes options of pretrain_gpt.py for positional arguments of its own.
    end = argv.index("--") if "--" in argv else len(argv)
    own, flags = argv[:end], argv[end + 1 :]
    parser = _Parser(prog="megatron-dion", description="Dion on Megatron-core.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.help, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if own and own[0] == name:
            _declare(subparser, importlib.import_module(command.module))
    args = parser.parse_args(own)
    if flags:
        if not hasattr(args, "flags"):
            parser.error(f"nothing may follow --, as {' '.join(flags)} does")
        args.flags = list(flags)
    return args


def _declare(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    parser.description = module.__doc__
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


if __name__ == "__main__":
    main()
