"""How much processor time does the busiest rank spend in a step, against its share of one process?

A rank's share is the time that one process needs for the whole, divided by the number of ranks.
That is measured in two ways: while the other ranks wait (`alone`), and while all of them do the
same (`together`), which is the load that the memory has during a sharded step.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist

from benchmarks._common import (
    Case,
    Goal,
    Row,
    Timing,
    in_world,
    interleaved,
    largest,
    make_parser,
    parse,
    ratio,
    report,
    summary,
)
from benchmarks._models import Topology, add_topologies, checked_step, dion_on_pieces, gpt
from megatron_dion import DionConfig
from megatron_dion_tools.plan import GptShape
from megatron_dion_tools.plan.loads import loads

LIMIT = 1.25


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each rank of each topology."""
    args = _parse(argv)
    shape = gpt(args.hidden, args.layers)
    rows: list[Row] = []
    goals: list[Goal] = []
    for topology in args.topologies:
        measured = in_world(topology.size, _measure, shape, topology, args)
        if measured is not None:
            found = _rows(topology, measured, args.device)
            rows += found
            name = f"{topology}: busiest rank's time / (one process's / {topology.size})"
            goals.append(Goal(name, largest(found, "to_alone") or 0, LIMIT))
    report(args, {"sharded": rows}, goals)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=5)
    add_topologies(parser, "2x1 1x2 2x2", takes_ranks=True)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--fraction", type=Fraction, default=Fraction(1, 4))
    parser.add_argument("--bucket-size", type=int, help="of Megatron, in elements; default: one")
    return parse(parser, argv)


@dataclass(frozen=True)
class Measured:
    """What a rank reports.

    Attributes:
        timings: of its part of a step, and of whole steps on one rank and on all.
        held: elements of weights.
        charges: matrices of whose P it orthonormalizes rows.
        operations: of these orthonormalizations.
        sent: bytes in a step.
    """

    timings: dict[str, Timing]
    held: int
    charges: int
    operations: float
    sent: int


def _measure(shape: GptShape, topology: Topology, args: argparse.Namespace) -> Measured:
    torch.manual_seed(dist.get_rank())
    config = DionConfig(rank_fraction=float(args.fraction))
    groups = topology.join()
    sharded = dion_on_pieces(shape, topology, config, groups, args.device, args.bucket_size)
    whole = dion_on_pieces(shape, Topology(), config, device=args.device)
    is_first = dist.get_rank() == 0
    cases = {
        "sharded": Case(lambda: checked_step(sharded)),
        "alone": Case(lambda: checked_step(whole) if is_first else None),
        "together": Case(lambda: checked_step(whole)),
    }
    timings = interleaved(cases, args.repeats)
    load = loads(sharded.planner())[topology.rank(dist.get_rank())]
    sent = sharded.bytes_per_step()
    return Measured(timings, load.held, load.charges, load.operations, sent)


def _rows(topology: Topology, measured: Sequence[Measured], device: str) -> list[Row]:
    alone = measured[0].timings["alone"].cost(device)
    together = [rank.timings["together"].cost(device) for rank in measured]
    mean_together = [sum(costs) / topology.size for costs in zip(*together, strict=True)]
    rows: list[Row] = []
    for number, rank in enumerate(measured):
        coordinates = topology.rank(number)
        cost = rank.timings["sharded"].cost(device)
        to_alone = ratio([topology.size * seconds for seconds in cost], alone)
        to_together = ratio([topology.size * seconds for seconds in cost], mean_together)
        rows.append(
            {
                "topology": str(topology),
                "rank": f"tp {coordinates.tensor_parallel} dp {coordinates.data_parallel}",
                "held_M": rank.held / 1e6,
                "charges": rank.charges,
                "orthonormalize_GFLOP": rank.operations / 1e9,
                "sent_MB": rank.sent / 1e6,
                "step_ms": 1e3 * summary(cost).median,
                "step_wall_ms": 1e3 * summary(rank.timings["sharded"].wall).median,
                "alone_ms": 1e3 * summary(alone).median,
                "together_ms": 1e3 * summary(mean_together).median,
                "to_alone": to_alone.median,
                "low": to_alone.low,
                "high": to_alone.high,
                "to_together": to_together.median,
            }
        )
    return rows


if __name__ == "__main__":
    main()
