"""What does a step cost each rank, when there are more ranks with the same work for each?

The model has as many layers as there are ranks. Of more ranks than cores the wall time means
nothing: compare their processor time.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial

import torch
import torch.distributed as dist

from benchmarks._common import (
    Case,
    Row,
    Timing,
    in_world,
    interleaved,
    make_parser,
    parse,
    ratio,
    report,
    summary,
    wall_is_meaningful,
)
from benchmarks._models import Topology, checked_step, dion_on_pieces, gpt
from megatron_dion import DionConfig

_ALONE = "alone"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each number of ranks of each kind of parallelism."""
    args = _parse(argv)
    rows: list[Row] = []
    for ranks in args.ranks:
        measured = in_world(ranks, _measure, ranks, args)
        if measured is not None:
            rows += _rows(measured, args.device)
    report(args, {"scaling": rows})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--fraction", type=Fraction, default=Fraction(1, 4))
    return parse(parser, argv)


def _measure(ranks: int, args: argparse.Namespace) -> dict[str, Timing]:
    """On a rank: its part of a step, and a step of one layer by itself."""
    torch.manual_seed(dist.get_rank())
    config = DionConfig(rank_fraction=float(args.fraction))
    shape = gpt(args.hidden, ranks)
    layer = dion_on_pieces(gpt(args.hidden, 1), Topology(), config, device=args.device)
    cases = {_ALONE: Case(lambda: checked_step(layer))}
    for name, topology in (("data", Topology(1, ranks)), ("tensor", Topology(ranks, 1))):
        sharded = dion_on_pieces(shape, topology, config, topology.join(), args.device)
        cases[name] = Case(partial(checked_step, sharded))
    return interleaved(cases, args.repeats)


def _rows(measured: Sequence[Mapping[str, Timing]], device: str) -> list[Row]:
    costs = {name: _by_round(measured, name, device) for name in measured[0]}
    alone = [statistics.mean(ranks) for ranks in costs[_ALONE]]
    rows: list[Row] = []
    for name in ("data", "tensor"):
        busiest = [max(ranks) for ranks in costs[name]]
        to_alone = ratio(busiest, alone)
        rows.append(
            {
                "parallel": name,
                "ranks": len(measured),
                "busiest_ms": 1e3 * summary(busiest).median,
                "mean_ms": 1e3 * summary([statistics.mean(r) for r in costs[name]]).median,
                "wall_ms": 1e3 * summary(measured[0][name].wall).median,
                "wall_is_meaningful": wall_is_meaningful(len(measured), device),
                "alone_ms": 1e3 * summary(alone).median,
                "busiest_to_alone": to_alone.median,
                "low": to_alone.low,
                "high": to_alone.high,
            }
        )
    return rows


def _by_round(
    measured: Sequence[Mapping[str, Timing]], name: str, device: str
) -> list[tuple[float, ...]]:
    """For each round what each rank needed."""
    return list(zip(*(timings[name].cost(device) for timings in measured), strict=True))


if __name__ == "__main__":
    main()
