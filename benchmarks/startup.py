"""What does it take to start: imports, planning, the first step?

Four tables. `import`: a new interpreter that imports something. `plan`: planning a step of Llama 3
on grids of up to 1024 ranks, which every rank does at its start. `command`: `megatron-dion plan` of
a whole cluster, start of the interpreter included. `first step`: it makes states and buffers, later
steps do not.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks._common import Case, Row, interleaved, make_parser, parse, ratio, report, summary
from benchmarks._models import Topology, checked_step, dion_on_pieces, gpt
from megatron_dion import Dion, DionConfig
from megatron_dion.sharding import Grid, Planner, Rank, sets_in_turn
from megatron_dion_tools.plan import PRESETS, default_bucket_size, place

IMPORTS = {
    "torch": "import torch",
    "megatron_dion": "import megatron_dion",
    "Megatron's training, on CPU": "from megatron_dion_tools.local import preload; preload.preload()",
}
COMMANDS = ("plan 405B --tp 8 --pp 16 --dp 800 --optimizer adamw muon dion:1/4",)
_FIRST_RANK = Rank()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the four tables."""
    args = _parse(argv)
    tables = {
        "import": _timed(
            "code", {name: partial(_run, "-c", IMPORTS[name]) for name in args.imports}, args
        ),
        "plan": [row for grid in args.grids for row in _plan_rows(grid, args)],
        "command": _timed(
            "megatron-dion",
            {
                line: partial(_run, "-m", "megatron_dion", *shlex.split(line))
                for line in args.commands
            },
            args,
        ),
        "first step": _step_rows(args),
    }
    report(args, tables)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument(
        "--imports", nargs="+", choices=IMPORTS, default=list(IMPORTS), metavar="NAME"
    )
    parser.add_argument("--model", choices=PRESETS, default="8B", help="that is planned")
    parser.add_argument(
        "--grids",
        type=Topology.parse,
        nargs="+",
        default=[Topology(1, 8), Topology(1, 64), Topology(1, 1024), Topology(8, 128)],
        metavar="TPxDP",
    )
    parser.add_argument("--commands", nargs="+", default=COMMANDS, metavar="'plan ...'")
    parser.add_argument("--hidden", type=int, default=512, help="of the model that is stepped")
    parser.add_argument("--layers", type=int, default=2)
    return parse(parser, argv)


def _timed(
    heading: str, runs: dict[str, Callable[[], object]], args: argparse.Namespace
) -> list[Row]:
    timings = interleaved({name: Case(run) for name, run in runs.items()}, args.repeats)
    return [
        {
            heading: name,
            "wall_s": summary(timing.wall).median,
            "low": summary(timing.wall).low,
            "high": summary(timing.wall).high,
        }
        for name, timing in timings.items()
    ]


def _run(*arguments: str) -> None:
    """In another process: modules are imported once in each."""
    command = [sys.executable, "-W", "ignore", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def _plan_rows(topology: Topology, args: argparse.Namespace) -> list[Row]:
    shape = PRESETS[args.model]
    bucket = default_bucket_size(topology.dp)
    placements = place(shape.weights(range(shape.layers), topology.tp), topology.dp, bucket)
    grid = Grid(topology.tp, topology.dp)

    def plan() -> None:
        sets = sets_in_turn(placements, range(len(placements)), grid.size)
        Planner(placements, grid, DionConfig(), sets).plans(_FIRST_RANK)

    return _timed("grid", {f"{args.model} on {topology}": plan}, args)


def _step_rows(args: argparse.Namespace) -> list[Row]:
    """The first step of a new optimizer, which then takes the next one."""
    current: list[Dion] = []

    def renew() -> None:
        current[:] = [
            dion_on_pieces(
                gpt(args.hidden, args.layers), Topology(), DionConfig(), device=args.device
            )
        ]

    cases = {
        "first": Case(lambda: checked_step(current[0]), prepare=renew),
        "second": Case(lambda: checked_step(current[0])),
        "third": Case(lambda: checked_step(current[0])),
    }
    timings = interleaved(cases, args.repeats)
    rows: list[Row] = []
    for name, timing in timings.items():
        to_third = ratio(timing.wall, timings["third"].wall)
        rows.append(
            {
                "step": name,
                "wall_ms": 1e3 * summary(timing.wall).median,
                "processor_ms": 1e3 * summary(timing.processor).median,
                "to_third": to_third.median,
                "low": to_third.low,
                "high": to_third.high,
            }
        )
    return rows


if __name__ == "__main__":
    main()
