"""Convergence regression tests: train the runs of cases, and check how their curves lie.

A case is a yaml file that says what is trained and what must hold. Its golden curves are in the
folder `golden` beside it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dion_tools.convergence import comparison, page, pictures
from megatron_dion_tools.convergence.case import Case, read_case
from megatron_dion_tools.convergence.checks import SHARE
from megatron_dion_tools.convergence.curves import read_curves
from megatron_dion_tools.convergence.environment import Environment, describe
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.convergence.evaluation import (
    evaluate,
    require_comparable,
    wanted_by_checks,
    wanted_by_golden,
)
from megatron_dion_tools.convergence.golden import (
    Golden,
    difference,
    read_golden,
    require_finite,
    write_golden,
)
from megatron_dion_tools.convergence.trainer import Trainer
from megatron_dion_tools.data.prepared import data_flags, data_with_vocabulary, prepare
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.preload import preload
from megatron_dion_tools.local.runs import RunFailed

CASES = Path("tests", "convergence")


def run(arguments: argparse.Namespace) -> None:
    """Do what the action says; exit with status 1 if runs differ where they must not."""
    try:
        arguments.command(arguments)
    except (ConvergenceError, RunFailed) as error:
        raise ToolError(str(error)) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    commands = parser.add_subparsers(required=True, metavar="ACTION")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")

    train = command("run", "train the runs that checks need, and check nothing")
    check = command("check", "train, check, and write the report; status 1 if a check fails")
    report = command("report", "check once more what was trained last, and write the report")
    update = command("update", "train golden runs and show what changes; --write keeps them")
    compare = command("compare", "compare runs of your own, the first of them being the reference")
    for parser_of_cases, function in (
        (train, run_cases),
        (check, check_cases),
        (report, report_cases),
        (update, update_cases),
    ):
        _add_cases(parser_of_cases)
        parser_of_cases.set_defaults(command=function)
    for parser_with_controls in (train, check, report):
        parser_with_controls.add_argument(
            "--controls", action="store_true", help="and runs with a known mistake, which must fail"
        )
    update.add_argument("--write", action="store_true", help="make the new curves the golden ones")
    _add_comparison(compare)
    compare.set_defaults(command=compare_runs)


def _add_cases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cases", type=Path, nargs="*", help="yaml files (default: all in tests/convergence)"
    )
    parser.add_argument(
        "--short", action="store_true", help="only cases that call themselves short"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs", "convergence"), metavar="DIR",
        help="for runs and report",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (one per core)"
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    what = "a metrics.jsonl, its folder, or a folder of TensorBoard"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=what)
    parser.add_argument(
        "--noise", type=Path, nargs="+", default=[], metavar="RUN",
        help="three runs or more like the first, which differ in their seed only",
    )  # fmt: skip
    parser.add_argument(
        "--share", type=float, default=SHARE,
        help="of the seed noise that a run may be away (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--quantity", action="append", default=[], help="such as lm_loss")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for a picture and a page")


def run_cases(arguments: argparse.Namespace) -> None:
    """Train."""
    for trainer in trainers(arguments):
        trainer.train(wanted_by_checks(trainer.case, arguments.controls), arguments.jobs, say)


def check_cases(arguments: argparse.Namespace) -> None:
    """Train and check."""
    found = trainers(arguments)
    for trainer in found:  # before hours of training, not after
        golden = read_golden(golden_path(arguments, trainer.case))
        require_comparable(trainer, golden, environment_of(trainer))
    for trainer in found:
        trainer.train(wanted_by_checks(trainer.case, arguments.controls), arguments.jobs, say)
    judge(arguments, found)


def report_cases(arguments: argparse.Namespace) -> None:
    """Check what was trained last."""
    judge(arguments, trainers(arguments))


def judge(arguments: argparse.Namespace, trained: Sequence[Trainer]) -> None:
    """Check, write the report, and exit with status 1 if a check failed."""
    sections = [section(arguments, trainer) for trainer in trained]
    outcomes = [one.outcome for one in sections]
    for outcome in outcomes:
        picture = arguments.output / f"{outcome.case.name}.png"
        picture.write_bytes(pictures.png(pictures.draw_case(outcome)))
    report = arguments.output / "report.html"
    report.write_text(page.render(sections), encoding="utf-8")
    say(f"report: {report}")
    print(page.text(outcomes), end="")
    if not all(outcome.passed for outcome in outcomes):
        sys.exit(1)


def section(arguments: argparse.Namespace, trainer: Trainer) -> page.Section:
    """What became of a case."""
    golden = read_golden(golden_path(arguments, trainer.case))
    here = environment_of(trainer)
    return page.Section(
        outcome=evaluate(trainer, golden, here, arguments.controls),
        golden=golden.environment,
        here=here,
        commands=commands_of(trainer),
    )


def update_cases(arguments: argparse.Namespace) -> None:
    """Train golden runs with all seeds, show what changes, and keep them if asked to."""
    found = trainers(arguments)
    here = [environment_of(trainer) for trainer in found]  # before a file changes the revision
    for trainer, environment in zip(found, here, strict=True):
        case, path = trainer.case, golden_path(arguments, trainer.case)
        old = read_golden(path) if path.exists() else None
        trainer.train(wanted_by_golden(case), arguments.jobs, say)
        new = Golden(
            environment=environment,
            commands={name: trainer.command(case.runs[name]) for name in case.golden},
            curves={
                name: {seed: trainer.curves(case.runs[name], seed) for seed in case.seeds}
                for name in case.golden
            },
        )
        require_finite(new)
        for line in difference(old, new):
            say(f"{case.name}: {line}")
        if arguments.write:
            write_golden(path, new)
            say(f"{case.name}: wrote {path}")
        else:
            say(f"{case.name}: nothing written; --write makes these the golden curves")


def compare_runs(arguments: argparse.Namespace) -> None:
    """Compare any runs; exit with status 1 if they differ."""
    if len(arguments.runs) < 2:
        raise ToolError("compare needs two runs or more, the first of them being the reference")
    verdicts = comparison.compare(
        [read_curves(path) for path in arguments.runs],
        [read_curves(path) for path in arguments.noise],
        arguments.share,
        arguments.quantity,
    )
    print("\n".join(page.verdict_line(verdict) for verdict in verdicts))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        picture = arguments.output / "comparison.png"
        picture.write_bytes(pictures.png(pictures.draw_comparison(verdicts)))
        report = arguments.output / "comparison.html"
        report.write_text(page.render_comparison(verdicts), encoding="utf-8")
        say(f"report: {report}")
    if not all(verdict.passed for verdict in verdicts):
        sys.exit(1)


def trainers(arguments: argparse.Namespace) -> list[Trainer]:
    """The cases that were asked for, with their data prepared."""
    paths = arguments.cases or sorted(CASES.glob("*.yaml"))
    cases = [read_case(path) for path in paths]
    wanted = [case for case in cases if case.short or not arguments.short]
    if not cases:
        raise ToolError(f"there are no cases in {CASES}: name some, or start in a checkout")
    if not wanted:
        raise ToolError("no case to run: --short leaves out all that were named")
    preload()
    return [Trainer(case, arguments.output / case.name, data_of(case)) for case in wanted]


def data_of(case: Case) -> list[str]:
    """Prepare the corpus that a case trains on; the flags that name it."""
    if case.vocab_size is None:
        return []
    data = data_with_vocabulary(case.vocab_size)
    prepare(data)
    return data_flags(data)


def environment_of(trainer: Trainer) -> Environment:
    """This machine, and the data of a case, whether prepared or named by its own flags."""
    return describe((*trainer.case.flags, *trainer.data))


def commands_of(trainer: Trainer) -> dict[str, str]:
    """The flags of each run, and the checkpoint it starts from."""
    return {
        name: trainer.command(run)
        + (f" (continues {run.continues} at iteration {run.at})" if run.continues else "")
        for name, run in trainer.case.runs.items()
    }


def golden_path(arguments: argparse.Namespace, case: Case) -> Path:
    """Where the golden curves of a case are: beside its file."""
    paths = {path.stem: path.parent for path in arguments.cases}
    return paths.get(case.name, CASES) / "golden" / f"{case.name}.jsonl"


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)
