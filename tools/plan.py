"""Plan Dion's step for a large model without starting it: how evenly do the ranks share the work?

For each data-parallel size, what a rank of the last pipeline stage sends for P, adds up and
computes to orthonormalize: the mean of all ranks, and the busiest one as a multiple of it.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

from _common import ToolError, run_tool
from megatron_dion import DionConfig
from megatron_dion.planning.layout import default_bucket_size, place
from megatron_dion.planning.loads import busiest_to_mean, loads
from megatron_dion.planning.models import PRESETS, GptShape
from megatron_dion.sharding import Grid, Planner, sets_in_turn

COLUMNS = ("model", "TP", "PP", "DP", "MB sent", "M summed", "GFLOP", "busiest / mean", "plan")


@dataclass(frozen=True)
class Topology:
    """Parallel sizes of a run."""

    tp: int
    pp: int
    dp: int


def main() -> None:
    """Print one row for each data-parallel size."""
    args = _parse()
    print("  ".join(f"{name:>14}" for name in COLUMNS))
    for dp in args.dp:
        try:
            row = _row(args.model, Topology(args.tp, args.pp, dp), args.rank_fraction)
        except ValueError as error:
            raise ToolError(str(error)) from error
        print("  ".join(f"{value:>14}" for value in row), flush=True)


def _parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=PRESETS)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--dp", type=int, nargs="+", default=[8], help="data-parallel sizes")
    parser.add_argument("--rank-fraction", type=float, default=DionConfig().rank_fraction)
    return parser.parse_args(argv)


def _row(model: str, topology: Topology, rank_fraction: float) -> tuple[str, ...]:
    started = time.perf_counter()
    planner = _planner(PRESETS[model], topology, DionConfig(rank_fraction=rank_fraction))
    planner.plans(next(planner.layout.grid.ranks()))
    seconds = time.perf_counter() - started
    every = list(loads(planner).values())
    mean = {
        name: sum(getattr(load, name) for load in every) / len(every)
        for name in ("sent", "summed", "operations")
    }
    ratios = " ".join(f"{busiest_to_mean(every, name):.2f}" for name in mean)
    sizes = (topology.tp, topology.pp, topology.dp)
    figures = (mean["sent"] / 1e6, mean["summed"] / 1e6, mean["operations"] / 1e9)
    return (model, *map(str, sizes), *(f"{x:.4g}" for x in figures), ratios, f"{seconds:.1f} s")


def _planner(shape: GptShape, topology: Topology, config: DionConfig) -> Planner:
    """Plans the last pipeline stage as Megatron lays it out with overlapped communication."""
    weights = shape.weights(shape.stage_layers(topology.pp, topology.pp - 1), topology.tp)
    bucket = default_bucket_size(topology.dp, topology.pp - 1)
    placements = place(weights, topology.dp, bucket)
    grid = Grid(topology.tp, topology.dp)
    sets = sets_in_turn(placements, range(len(placements)), grid.size)
    return Planner(placements, grid, config, sets)


if __name__ == "__main__":
    run_tool(main)
