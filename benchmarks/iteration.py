"""What share of a training iteration is the optimizer's?

A small GPT is trained through pretrain_gpt.py, with each optimizer in turns, for a few iterations a
time. The step is timed as the run itself does it (`optimizer_seconds` of metrics.jsonl): gradient
norm, clipping and the gather of weights are in it.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks._common import Row, make_parser, parse, ratio, report, summary
from benchmarks._training import OPTIMIZERS, add_model_flags, model_flags, prepare, train
from megatron_dion.local.runs import Run
from megatron_dion.training.run_directory import Record, read_metrics

WARM_UP = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each optimizer."""
    args = _parse(argv)
    prepare(args.device)
    measured: dict[str, list[Record]] = {name: [] for name in args.optimizers}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.repeats):
            for name, records in measured.items():
                records += _train(name, Path(folder) / f"{name.replace('/', '-')} {number}", args)
    report(args, {"iteration": _rows(measured, args)})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3)
    add_model_flags(parser, hidden=256, layers=4)
    parser.add_argument("--processes", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--iterations", type=int, default=4, help="timed ones of each run")
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME"
    )
    return parse(parser, argv)


def _train(name: str, folder: Path, args: argparse.Namespace) -> list[Record]:
    """The timed iterations of one run."""
    iterations = str(WARM_UP + args.iterations)
    flags = (*model_flags(args), *OPTIMIZERS[name], "--train-iters", iterations)
    run = Run(name, folder, flags, args.processes)
    train(run)
    return read_metrics(run.metrics)[WARM_UP:]


def _rows(measured: Mapping[str, Sequence[Record]], args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for name, records in measured.items():
        step = [record["optimizer_seconds"] for record in records]
        iteration = [record["iteration_seconds"] for record in records]
        share = ratio(step, iteration)
        rows.append(
            {
                "optimizer": name,
                "hidden": args.hidden,
                "layers": args.layers,
                "tokens": args.batch * args.sequence,
                "iterations": len(records),
                "step_ms": 1e3 * summary(step).median,
                "iteration_ms": 1e3 * summary(iteration).median,
                "share_percent": 100 * share.median,
                "low": 100 * share.low,
                "high": 100 * share.high,
            }
        )
    return rows


if __name__ == "__main__":
    main()
