"""Run the studies behind docs/results.md, and report what they found.

Finished runs are reused, so an interrupted study goes on where it stopped.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from _common import ToolError, run_tool
from megatron_dion.convergence.environment import describe
from megatron_dion.local.preload import preload
from megatron_dion.local.runs import RunFailed
from megatron_dion.studies.results import StudyUnfinished, collect, to_json
from megatron_dion.studies.study import FileError, Study, Trials, conduct, read_study
from megatron_dion.studies.tables import page
from quick_start import ROOT, data_flags, data_with_vocabulary, prepare


def trials(study: Study, pool: Path) -> Trials:
    """A study's runs on the corpus, with the vocabulary it asks for."""
    return Trials(study, pool, data_flags(data_with_vocabulary(study.vocab_size)))


def run(studies: Sequence[Trials], jobs: int) -> None:
    """Train all that the studies need, some runs at a time."""
    for vocab_size in dict.fromkeys(one.study.vocab_size for one in studies):
        prepare(data_with_vocabulary(vocab_size))
    preload()
    for one in studies:
        conduct(one, jobs, lambda line: print(line, flush=True))


def report(studies: Sequence[Trials], results: Path, images: Path) -> None:
    """Write NAME.json and NAME.md to `results`, NAME_*.png to `images`, and print the tables."""
    # matplotlib is needed for reports only.
    from megatron_dion.studies.pictures import draw_all

    found = [collect(one, describe(one.data)) for one in studies]
    results.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    for result in found:
        name = result.study.name
        (results / f"{name}.json").write_text(to_json(result), encoding="utf-8")
        (results / f"{name}.md").write_text(page(result), encoding="utf-8")
        draw_all(result, images)
        print(page(result))


def read_command_line() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("study", type=Path, nargs="+", help="such as studies/optimizers.yaml")
    shared.add_argument(
        "--pool", type=Path, default=ROOT / "runs" / "pool", metavar="DIR", help="where runs are"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    running = actions.add_parser("run", parents=[shared], help="train what is missing")
    running.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (one per core)"
    )
    reporting = actions.add_parser("report", parents=[shared], help="write tables and pictures")
    docs = ROOT / "docs"
    reporting.add_argument("--results", type=Path, default=docs / "results", metavar="DIR")
    reporting.add_argument("--images", type=Path, default=docs / "images", metavar="DIR")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    arguments = read_command_line()
    try:
        studies = [trials(read_study(path), arguments.pool) for path in arguments.study]
        if arguments.action == "run":
            run(studies, arguments.jobs)
        else:
            report(studies, arguments.results, arguments.images)
    except (FileError, RunFailed, StudyUnfinished) as error:
        raise ToolError(str(error)) from error


if __name__ == "__main__":
    run_tool(main)
