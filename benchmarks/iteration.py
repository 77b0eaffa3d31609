"""How long does the optimizer's step take in a training run, and what share of an iteration?

A small GPT is trained through pretrain_gpt.py, on each topology, with each type of weights and each
optimizer in turns, for a few iterations a time. The step is timed as the run itself does it
(`optimizer_seconds` of metrics.jsonl, wall time of the first rank): gradient norm, clipping and the
gather of weights are in it, and what is waited for other ranks. Of more ranks than cores that means
little.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._common import (
    Row,
    make_parser,
    parse,
    ratio,
    report,
    summary,
    wall_is_meaningful,
)
from benchmarks._models import Topology, add_topologies
from benchmarks._training import (
    DTYPES,
    MUON_DUPLICATED,
    OPTIMIZERS,
    add_model_flags,
    model_flags,
    prepare,
    train,
)
from megatron_dion.megatron.run_directory import Record, read_metrics
from megatron_dion_tools.local.runs import Run

WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        topology: the ranks.
        dtype: of the weights, a key of `DTYPES`.
        optimizer: a key of `OPTIMIZERS`.
    """

    topology: Topology
    dtype: str
    optimizer: str

    def flags(self, args: argparse.Namespace) -> tuple[str, ...]:
        """Of pretrain_gpt.py."""
        return (
            *model_flags(args, self.topology),
            *DTYPES[self.dtype],
            *OPTIMIZERS[self.optimizer],
            *("--muon-fp32-matmul-prec", args.muon_fp32_matmul_prec),
            *("--train-iters", str(WARM_UP + args.iterations)),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each topology, type of weights and optimizer."""
    args = _parse(argv)
    prepare(args.device)
    measured: dict[Case, list[Record]] = {case: [] for case in _cases(args)}
    for _ in range(args.repeats):
        for case, records in measured.items():
            with tempfile.TemporaryDirectory() as folder:
                records += _train(case, Path(folder) / "run", args)
    report(args, {"iteration": _rows(measured, args)})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=1)
    add_model_flags(parser, hidden=256, layers=4)
    add_topologies(parser, "1x1 2x1 1x2 2x2")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--iterations", type=int, default=4, help="timed ones of each run")
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME"
    )
    parser.add_argument(
        "--muon-fp32-matmul-prec",
        choices=("medium", "high"),
        default="medium",
        help="Megatron's; medium, bf16, is slow on a CPU that has no instructions for it",
    )
    return parse(parser, argv)


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    for topology in args.topologies:
        for dtype in args.dtypes:
            for optimizer in args.optimizers:
                if optimizer != MUON_DUPLICATED or topology.tp > 1:  # or it is Muon once more
                    yield Case(topology, dtype, optimizer)


def _train(case: Case, folder: Path, args: argparse.Namespace) -> list[Record]:
    """The timed iterations of one run."""
    name = f"{case.optimizer}, {case.dtype}, {case.topology}"
    run = Run(name, folder, case.flags(args), case.topology.size)
    train(run)
    return read_metrics(run.metrics)[WARM_UP:]


def _rows(measured: Mapping[Case, Sequence[Record]], args: argparse.Namespace) -> list[Row]:
    steps = {case: [r["optimizer_seconds"] for r in records] for case, records in measured.items()}
    rows: list[Row] = []
    for case, records in measured.items():
        step = steps[case]
        adamw = steps.get(Case(case.topology, case.dtype, "AdamW"))
        iteration = [record["iteration_seconds"] for record in records]
        share = ratio(step, iteration)
        rows.append(
            {
                "topology": str(case.topology),
                "dtype": case.dtype,
                "optimizer": case.optimizer,
                "hidden": args.hidden,
                "layers": args.layers,
                "tokens": args.batch * args.sequence,
                "iterations": len(records),
                "step_ms": 1e3 * summary(step).median,
                "to_adamw": ratio(step, adamw).median if adamw else None,
                "iteration_ms": 1e3 * summary(iteration).median,
                "share_percent": 100 * share.median,
                "low": 100 * share.low,
                "high": 100 * share.high,
                "wall_is_meaningful": wall_is_meaningful(case.topology.size, args.device),
            }
        )
    return rows


if __name__ == "__main__":
    main()
