"""Check that training converges as it did, compare runs, and sweep learning rates.

A case is a YAML file that says what is trained and what must be true of the curves; its golden
curves are in the folder `golden` beside the case. A study is a YAML file that compares methods of
training, each at its own best learning rate.
"""

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_dion_tools.convergence.case import read_case
from megatron_dion_tools.convergence.case_runs import CaseRuns
from megatron_dion_tools.convergence.checks import SHARE, Verdict, compare
from megatron_dion_tools.convergence.curves import read_curves
from megatron_dion_tools.convergence.study import StudyRuns, read_study, to_json, to_markdown
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.preload import preload

CASES = Path("tests", "convergence")
_say = functools.partial(print, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, function: object, what: str) -> Callable[..., object]:
        subparser = actions.add_parser(name, help=what, description=what)
        subparser.set_defaults(action=function)
        return subparser.add_argument

    def add_training_flags(add: Callable[..., object], folder: str) -> None:
        default, jobs = Path("runs", folder), os.cpu_count()
        add("--output", type=Path, default=default, metavar="DIR", help="default: %(default)s")
        add("--jobs", type=int, default=jobs, help="ranks at a time (default: %(default)s)")

    for name, function, what in (
        ("check", check_cases, "train, check the curves, and draw them; status 1 if a check fails"),
        ("update", update_cases, "train golden runs with all seeds, and keep their curves"),
    ):
        add = action(name, function, what)
        add("cases", type=Path, nargs="*", help=f"YAML files (default: all in {CASES})")
        add_training_flags(add, "convergence")
    add = action("sweep", sweep_rates, "train studies, and write tables and pictures")
    add("studies", type=Path, nargs="+", help="YAML files; what is finished is not trained again")
    add("--pool", type=Path, default=Path("runs", "pool"), metavar="DIR", help="for the runs")
    add_training_flags(add, "studies")
    add = action("compare", compare_runs, "compare any runs with the first of them")
    add("runs", type=Path, nargs="+", metavar="RUN", help="a metrics.jsonl, or its folder")
    noise = "three runs or more like the first one, which differ in their seed only"
    add("--noise", type=Path, nargs="+", default=[], metavar="RUN", help=noise)
    share = "share of the seed noise by which a run may be away (default: %(default)s)"
    add("--share", type=float, default=SHARE, help=share)
    add("--quantity", action="append", default=[], help="such as lm_loss")
    add("--output", type=Path, metavar="DIR", help="for a picture")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; return 1 if runs differ, or a planted mistake was not noticed."""
    return arguments.action(arguments)


def check_cases(arguments: argparse.Namespace) -> int:
    """Train the runs of cases and check their curves."""
    given = [(runs, runs.read_golden()) for runs in _cases(arguments)]  # Fails before training.
    verdicts = []
    for runs, golden in given:
        case = runs.case
        names = [run for check in case.checks for run in (*check.runs, check.reference)]
        names = list(dict.fromkeys([*case.golden, *names]))
        runs.train(names, case.seeds[:1], arguments.jobs, _say)
        verdicts += _report(case.name, list(runs.verdicts(golden)), arguments.output)
    good = sum(verdict.is_good for verdict in verdicts)
    _say(f"{good} of {len(verdicts)} checks are as they must be; pictures in {arguments.output}")
    return int(good < len(verdicts))


def update_cases(arguments: argparse.Namespace) -> int:
    """Train golden runs with all seeds, and keep their curves."""
    for runs in _cases(arguments):
        case = runs.case
        runs.train(case.golden, case.seeds, arguments.jobs, _say)
        runs.write_golden()
        _say(f"wrote {case.golden_folder}")
    return 0


def compare_runs(arguments: argparse.Namespace) -> int:
    """Compare any runs."""
    runs, noise = ([read_curves(p, str(p)) for p in ps] for ps in (arguments.runs, arguments.noise))
    verdicts = compare(runs, noise, arguments.share, arguments.quantity)
    _report("comparison", verdicts, arguments.output)
    return int(not all(verdict.is_good for verdict in verdicts))


def sweep_rates(arguments: argparse.Namespace) -> int:
    """Train studies, and write NAME.md, NAME.json and NAME.png."""
    from megatron_dion_tools.convergence.pictures import draw_study

    given = [StudyRuns(read_study(path), arguments.pool) for path in arguments.studies]
    preload()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for runs in given:
        runs.train(arguments.jobs, _say)
        result, path = runs.result(), arguments.output / runs.study.name
        Path(f"{path}.json").write_text(to_json(result), encoding="utf-8")
        Path(f"{path}.md").write_text(to_markdown(result), encoding="utf-8")
        draw_study(result).savefig(f"{path}.png", dpi=120)
        _say(to_markdown(result))
    return 0


def _cases(arguments: argparse.Namespace) -> list[CaseRuns]:
    """Read the cases that were asked for, and prepare their data and this process."""
    cases = [read_case(path) for path in arguments.cases or sorted(CASES.glob("*.yaml"))]
    if not cases:
        raise ToolError(f"there are no cases in {CASES}: name some, or start in a checkout")
    runs = [CaseRuns(case, arguments.output / case.name) for case in cases]
    preload()
    return runs


def _report(title: str, verdicts: Sequence[Verdict], output: Path | None) -> list[Verdict]:
    """Print verdicts, those that are not as they must be first, and draw them."""
    verdicts = sorted(verdicts, key=lambda verdict: verdict.is_good)
    _say("\n".join(f"{title}: {verdict}" for verdict in verdicts))
    if output is not None:
        from megatron_dion_tools.convergence.pictures import draw_verdicts

        output.mkdir(parents=True, exist_ok=True)
        draw_verdicts(title, verdicts).savefig(output / f"{title}.png", dpi=120)
    return verdicts
