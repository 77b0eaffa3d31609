"""Run the studies behind docs/results.md, and report what they found.

Finished runs are reused, so an interrupted study goes on where it stopped.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_dion_tools.convergence.environment import describe
from megatron_dion_tools.data.prepared import data_flags, data_with_vocabulary, prepare
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.preload import preload
from megatron_dion_tools.local.runs import RunFailed
from megatron_dion_tools.studies.results import StudyUnfinished, collect, to_json
from megatron_dion_tools.studies.study import FileError, Study, Trials, conduct, read_study
from megatron_dion_tools.studies.tables import page


def trials(study: Study, pool: Path) -> Trials:
    """A study's runs on the corpus, with the vocabulary it asks for."""
    return Trials(study, pool, data_flags(data_with_vocabulary(study.vocab_size)))


def train(studies: Sequence[Trials], jobs: int) -> None:
    """Train all that the studies need, some runs at a time."""
    for vocab_size in dict.fromkeys(one.study.vocab_size for one in studies):
        prepare(data_with_vocabulary(vocab_size))
    preload()
    for one in studies:
        conduct(one, jobs, lambda line: print(line, flush=True))


def report(studies: Sequence[Trials], results: Path, images: Path) -> None:
    """Write NAME.json and NAME.md to `results`, NAME_*.png to `images`, and print the tables."""
    # matplotlib is needed for reports only.
    from megatron_dion_tools.studies.pictures import draw_all

    found = [collect(one, describe(one.data)) for one in studies]
    results.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    for result in found:
        name = result.study.name
        (results / f"{name}.json").write_text(to_json(result), encoding="utf-8")
        (results / f"{name}.md").write_text(page(result), encoding="utf-8")
        draw_all(result, images)
        print(page(result))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("study", type=Path, nargs="+", help="such as studies/optimizers.yaml")
    shared.add_argument(
        "--pool", type=Path, default=Path("runs", "pool"), metavar="DIR", help="where runs are"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    running = actions.add_parser("run", parents=[shared], help="train what is missing")
    running.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (one per core)"
    )
    reporting = actions.add_parser("report", parents=[shared], help="write tables and pictures")
    reporting.add_argument("--results", type=Path, default=Path("docs", "results"), metavar="DIR")
    reporting.add_argument("--images", type=Path, default=Path("docs", "images"), metavar="DIR")


def run(arguments: argparse.Namespace) -> None:
    """Train or report."""
    try:
        studies = [trials(read_study(path), arguments.pool) for path in arguments.study]
        if arguments.action == "run":
            train(studies, arguments.jobs)
        else:
            report(studies, arguments.results, arguments.images)
    except (FileError, RunFailed, StudyUnfinished) as error:
        raise ToolError(str(error)) from error
