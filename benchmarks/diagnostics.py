"""What does a step cost that is measured (`--dion-log-interval`), against one that is not?

Of several ranks the busiest is compared with the busiest.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
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
)
from benchmarks._models import Topology, add_topologies, checked_step, dion_on_pieces, gpt
from megatron_dion import Dion, DionConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each topology and rank fraction."""
    args = _parse(argv)
    rows: list[Row] = []
    for topology in args.topologies:
        measured = in_world(topology.size, _measure, topology, args)
        if measured is not None:
            rows += [
                _row(topology, fraction, [of_rank[str(fraction)] for of_rank in measured], args)
                for fraction in args.fractions
            ]
    report(args, {"diagnostics": rows})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=7)
    add_topologies(parser, "1x1 2x1 1x2")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument(
        "--fractions", type=Fraction, nargs="+", default=[Fraction(1, k) for k in (16, 4, 1)]
    )
    return parse(parser, argv)


@dataclass(frozen=True)
class _Pair:
    plain: Timing
    measured: Timing


def _measure(topology: Topology, args: argparse.Namespace) -> dict[str, _Pair]:
    """On a rank: both kinds of step at each rank fraction."""
    torch.manual_seed(dist.get_rank())
    groups = topology.join()
    found = {}
    for fraction in args.fractions:
        config = DionConfig(rank_fraction=float(fraction))
        dion = dion_on_pieces(gpt(args.hidden, args.layers), topology, config, groups, args.device)
        cases = {
            "plain": Case(partial(checked_step, dion)),
            "measured": Case(partial(_measured_step, dion)),
        }
        found[str(fraction)] = _Pair(**interleaved(cases, args.repeats))
    return found


def _measured_step(dion: Dion) -> None:
    dion.diagnose_next_step()
    checked_step(dion)
    dion.take_diagnostics()


def _row(
    topology: Topology, fraction: Fraction, ranks: Sequence[_Pair], args: argparse.Namespace
) -> Row:
    plain, measured = (
        [max(rounds) for rounds in zip(*costs, strict=True)]
        for costs in (
            [pair.plain.cost(args.device) for pair in ranks],
            [pair.measured.cost(args.device) for pair in ranks],
        )
    )
    to_plain = ratio(measured, plain)
    return {
        "topology": str(topology),
        "hidden": args.hidden,
        "layers": args.layers,
        "fraction": str(fraction),
        "step_ms": 1e3 * summary(plain).median,
        "measured_ms": 1e3 * summary(measured).median,
        "measured_to_step": to_plain.median,
        "low": to_plain.low,
        "high": to_plain.high,
    }


if __name__ == "__main__":
    main()
