"""The command `megatron-dion`: a table of subcommands.

A subcommand is a module with a docstring, which is its description, and two functions:

    add_arguments(parser: argparse.ArgumentParser) -> None
    run(args: argparse.Namespace) -> int | None

`run` returns the exit code (None for 0) and raises `megatron_dion_tools.errors.ToolError` for a
mistake of the user. To add a subcommand, write the module and add a line to `COMMANDS`. Only the
module of the subcommand that was asked for is imported; it imports torch, if it needs torch, in
`run`, so that `--help` is quick.

A subcommand that takes flags of pretrain_gpt.py after `--` declares `parser.set_defaults(flags=[])`
and finds these flags in `args.flags`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_dion_tools.errors import ToolError, run_tool

COMMANDS = {
    "doctor": ("megatron_dion_tools.doctor.command", "examine this machine, or all ranks"),
    "data": ("megatron_dion_tools.data.command", "corpus, tokenizer, datasets"),
    "plan": ("megatron_dion_tools.plan.command", "plan a run of a large model"),
    "launch": ("megatron_dion_tools.launch", "check a recipe and submit it to Slurm"),
    "inspect": ("megatron_dion_tools.inspect", "what a checkpoint holds"),
    "convergence": ("megatron_dion_tools.convergence.command", "do runs converge alike?"),
    "report": ("megatron_dion_tools.report.command", "make a page about a run"),
}
REMOVED = {
    "advise": "use `megatron-dion report`: its page says how much of each matrix the rank captures",
    "study": "use `megatron-dion convergence sweep`",
    "convergence run": "use `megatron-dion convergence check`, which trains",
    "convergence report": "use `megatron-dion convergence check`, which draws",
    "convergence --controls": "leave it out: `check` plants the mistakes of a case as well",
    "convergence --short": "leave it out: the case says how long its runs are",
    "convergence --write": "leave it out: `update` writes",
    "data --json-keys": "call once for each key, with --json-key KEY",
    "data --workers": "Megatron-LM's tools/preprocess_data.py tokenizes large corpora",
    "doctor --json": "read its exit code",
    "doctor --run-dir": "df shows the free space",
    "doctor --shared-folder": "srun ls DIR shows what each node sees",
    "inspect --no-norms": "leave out --verify",
    "launch --job-name": "use --sbatch-flag=--job-name=NAME and --run-dir",
    "launch --script": "sbatch takes another script and RUN_DIR/recipe.args",
    "plan --dion-exchange-buffer-mib": "use --dion-exchange-sets N",
    "plan --ep": "experts are not planned",
    "plan --plot": "--json has the figures",
}
"""What is gone, and what to use in its place: subcommands, actions, and flags behind them."""


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line; argparse would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ToolError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand, by default that of the process, and end with its exit code."""
    words = sys.argv[1:] if argv is None else argv
    run_tool(lambda: call(words))


def call(argv: Sequence[str]) -> int | None:
    """Run a subcommand and return its exit code; mistakes are exceptions."""
    args = parse(argv)
    return args.run(args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; `args.run` is the function of the subcommand.

    Raises:
        ToolError: The command line is wrong.
    """
    # argparse would take what follows `--` for positional arguments.
    end = argv.index("--") if "--" in argv else len(argv)
    own, flags = argv[:end], list(argv[end + 1 :])
    given = [word.partition("=")[0] for word in own if word.startswith("--")]
    for words in (own[:1], own[:2], *([*own[:1], flag] for flag in given)):
        if what := REMOVED.get(" ".join(words)):
            raise ToolError(f"`megatron-dion {' '.join(words)}` is gone: {what}")
    parser = _Parser(prog="megatron-dion", description="Dion on Megatron-core.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module_name, what) in COMMANDS.items():
        command = commands.add_parser(
            name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if own and own[0] == name:
            module = importlib.import_module(module_name)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(own)
    if flags and not hasattr(args, "flags"):
        parser.error(f"nothing may follow --, as {' '.join(flags)} does")
    if flags:
        args.flags = flags
    return args
