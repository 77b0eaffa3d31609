"""What memory does a rank need for the optimizer: state, between steps, and at most in a step?

All that torch allocates is counted by its profiler, memory inside of operators included.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks._common import Goal, Row, in_world, largest, make_parser, parse, report
from benchmarks._models import LR, Topology, add_topologies, checked_step, dion_on_pieces, gpt
from megatron_dion import Dion, DionConfig
from megatron_dion.platforms.cpu_adam import CpuAdam
from megatron_dion_tools.plan import GptShape

MB = 1e6
_BYTES = 4  # of a number of weights

Needs = dict[str, float]
"""Bytes by what they are for."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each topology and rank fraction, of the rank that needs most."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says when it starts
    args = _parse(argv)
    shape = gpt(args.hidden, args.layers)
    rows: list[Row] = []
    for topology in args.topologies:
        measured = in_world(topology.size, _measure, shape, topology, args)
        if measured is not None:
            rows += _rows(topology, measured)
    report(args, {"memory": rows}, _goals(rows))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=1)
    add_topologies(parser, "1x1 2x1 1x2 2x2", takes_ranks=True)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--fractions", type=Fraction, nargs="+", default=[Fraction(1, k) for k in (16, 8, 4, 2, 1)]
    )
    parser.add_argument("--bucket-size", type=int, help="of Megatron, in elements; default: one")
    return parse(parser, argv)


@dataclass(frozen=True)
class Measured:
    """Of a rank.

    Attributes:
        adamw: bytes of AdamW's state.
        dion: needs of Dion, by rank fraction.
    """

    adamw: float
    dion: dict[Fraction, Needs]


def _measure(shape: GptShape, topology: Topology, args: argparse.Namespace) -> Measured:
    groups = topology.join()

    def dion(fraction: Fraction) -> Dion:
        config = DionConfig(rank_fraction=float(fraction))
        return dion_on_pieces(shape, topology, config, groups, args.device, args.bucket_size)

    adamw = CpuAdam(_weights(dion(args.fractions[0])), lr=LR)
    adamw.step()
    needs = {fraction: _needs_of(dion(fraction), args.device) for fraction in args.fractions}
    return Measured(_state_bytes(adamw), needs)


def _needs_of(optimizer: Dion, device: str) -> Needs:
    first = allocations(lambda: checked_step(optimizer), device)
    later = allocations(lambda: checked_step(optimizer), device)
    state = _state_bytes(optimizer)
    layout = optimizer.planner().layout
    sharded = [
        _BYTES * matrix.rows * matrix.columns
        for matrix, holders in zip(layout.matrices, layout.columns_of_holders, strict=True)
        if len(holders) > 1
    ]
    return {
        "weights": sum(weight.nbytes for weight in _weights(optimizer)),
        "state": state,
        "kept": sum(first) - state,
        "peak": max(accumulate(later), default=0),
        "largest": max(later, default=0),
        "largest_first": max(first, default=0),
        "smallest_sharded": min(sharded, default=0),
    }


def allocations(run: Callable[[], object], device: str) -> list[int]:
    """The bytes of each allocation of torch while something runs, in order; frees are negative."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")  # not run on GPUs
    dist.barrier()
    with profile(activities=kinds, profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    found = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type().name.lower() == device
    ]
    return [nbytes for _, nbytes in sorted(found, key=lambda pair: pair[0])]


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    )


def _rows(topology: Topology, measured: Sequence[Measured]) -> list[Row]:
    rows: list[Row] = []
    for fraction in measured[0].dion:
        needs = [rank.dion[fraction] for rank in measured]
        most = {name: max(need[name] for need in needs) for name in needs[0]}
        smallest = most["smallest_sharded"]
        rows.append(
            {
                "topology": str(topology),
                "fraction": str(fraction),
                "weights_MB": most["weights"] / MB,
                "adamw_state_MB": max(rank.adamw for rank in measured) / MB,
                "state_MB": most["state"] / MB,
                "state_to_adamw": max(
                    need["state"] / rank.adamw for need, rank in zip(needs, measured, strict=True)
                ),
                "kept_MB": most["kept"] / MB,
                "peak_MB": most["peak"] / MB,
                "largest_MB": most["largest"] / MB,
                "largest_first_MB": most["largest_first"] / MB,
                "smallest_sharded_MB": smallest / MB if smallest else None,
                "largest_to_sharded": most["largest"] / smallest if smallest else None,
            }
        )
    return rows


def _goals(rows: Sequence[Row]) -> list[Goal]:
    half = [row for row in rows if Fraction(str(row["fraction"])) <= Fraction(1, 2)]
    names = {
        "state_to_adamw": "state / AdamW's",
        "largest_to_sharded": "largest tensor / smallest sharded matrix",
    }
    found = {name: largest(half, column) for column, name in names.items()}
    return [
        Goal(f"{name}, rank fractions up to 1/2", value, 1.0)
        for name, value in found.items()
        if value is not None
    ]


if __name__ == "__main__":
    main()
