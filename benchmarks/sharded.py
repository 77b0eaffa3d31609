"""How much processor time does each rank spend in a step, against its share of one process?

The share is the time that one process needs for the whole model while the other ranks wait, divided
by the number of ranks.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist

from benchmarks._common import (
    Row,
    in_world,
    interleaved,
    make_parser,
    parse,
    ratio,
    report,
    summary,
)
from benchmarks._models import Topology, add_model_flags, checked_step, dion_on_pieces, gpt
from megatron_dion import DionConfig
from megatron_dion.algorithm.orthonormalize import orthonormalize_flops
from megatron_dion.sharding.layout import Layout, Rank
from megatron_dion_tools.plan import GptShape


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each rank of each topology."""
    parser = make_parser(__doc__, repeats=5)
    add_model_flags(parser, hidden=1024, topologies="2x1 1x2 2x2")
    parser.add_argument("--fraction", type=Fraction, default=Fraction(1, 4), help="rank fraction")
    args = parse(parser, argv)
    shape = gpt(args.hidden, args.layers)
    rows: list[Row] = []
    for topology in args.topologies:
        ranks = in_world(topology.size, _measure, shape, topology, args)
        if ranks is not None:
            rows += _rows(topology, ranks)
    report(args, [("sharded", rows)])


@dataclass(frozen=True)
class Measured:
    """What a rank reports.

    Attributes:
        times: milliseconds of `sharded` steps and of steps `alone`, one figure a round.
        elements: of the weights that the rank holds.
        operations: of the orthonormalizations that the rank takes part in.
        sent: bytes in a step.
    """

    times: dict[str, list[float]]
    elements: int
    operations: int
    sent: int


def _measure(shape: GptShape, topology: Topology, args: argparse.Namespace) -> Measured:
    number = dist.get_rank()
    torch.manual_seed(number)
    config = DionConfig(rank_fraction=float(args.fraction))
    groups = topology.join()
    sharded = dion_on_pieces(shape, topology, config, groups, args.device, args.bucket_size)
    alone = dion_on_pieces(shape, Topology(), config, device=args.device)
    cases = {
        "sharded": lambda: checked_step(sharded),
        "alone": lambda: checked_step(alone) if number == 0 else None,
    }
    times = interleaved(cases, args.repeats, args.device)
    elements = sum(p.numel() for group in sharded.param_groups for p in group["params"])
    operations = _operations(sharded.bind().layout, topology.rank(number))
    return Measured(times, elements, operations, sharded.bind().bytes_per_step())


def _operations(layout: Layout, rank: Rank) -> int:
    operations = 0
    for k, owner in enumerate(layout.owners):
        if owner == rank.data_parallel:
            first, last = layout.owned_rows(k, rank.tensor_parallel)
            operations += orthonormalize_flops(last - first, layout.matrices[k].rank)
    return operations


def _rows(topology: Topology, ranks: Sequence[Measured]) -> list[Row]:
    alone = ranks[0].times["alone"]
    rows: list[Row] = []
    for number, rank in enumerate(ranks):
        coordinates, sharded = topology.rank(number), rank.times["sharded"]
        to_share = ratio([topology.size * milliseconds for milliseconds in sharded], alone)
        rows.append(
            {
                "topology": str(topology),
                "rank": f"tp {coordinates.tensor_parallel} dp {coordinates.data_parallel}",
                "elements_M": rank.elements / 1e6,
                "orthonormalize_GFLOP": rank.operations / 1e9,
                "sent_MB": rank.sent / 1e6,
                "step_ms": summary(sharded).median,
                "alone_ms": summary(alone).median,
                "to_share": to_share.median,
                "low": to_share.low,
                "high": to_share.high,
            }
        )
    return rows


if __name__ == "__main__":
    main()
