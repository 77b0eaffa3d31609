"""What memory does a rank need for the optimizer: state, between steps, and at most in a step?

torch's profiler counts all allocations, memory inside of operators included.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks._common import Row, in_world, make_parser, parse, report
from benchmarks._models import Topology, add_model_flags, checked_step, dion_on_pieces, gpt
from megatron_dion import Dion, DionConfig
from megatron_dion_tools.plan import GptShape

MB = 1e6
Needs = dict[str, float]
"""Bytes by what they are for."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each topology and rank fraction, of the rank that needs most."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says when it starts
    parser = make_parser(__doc__, repeats=1)
    add_model_flags(parser, hidden=512, topologies="1x1 2x1 1x2 2x2")
    parser.add_argument(
        "--fractions", type=Fraction, nargs="+", default=[Fraction(1, k) for k in (16, 8, 4, 2, 1)]
    )
    args = parse(parser, argv)
    shape = gpt(args.hidden, args.layers)
    rows: list[Row] = []
    for topology in args.topologies:
        ranks = in_world(topology.size, _measure, shape, topology, args)
        if ranks is not None:
            rows += [_row(topology, f, [needs[f] for needs in ranks]) for f in args.fractions]
    report(args, [("memory", rows)])


def _measure(
    shape: GptShape, topology: Topology, args: argparse.Namespace
) -> dict[Fraction, Needs]:
    groups = topology.join()
    needs = {}
    for fraction in args.fractions:
        config = DionConfig(rank_fraction=float(fraction))
        dion = dion_on_pieces(shape, topology, config, groups, args.device, args.bucket_size)
        needs[fraction] = _needs_of(dion, args.device)
    return needs


def _needs_of(optimizer: Dion, device: str) -> Needs:
    first = _allocations(lambda: checked_step(optimizer), device)
    later = _allocations(lambda: checked_step(optimizer), device)
    state = sum(
        tensor.nbytes
        for states in optimizer.state.values()
        for tensor in states.values()
        if isinstance(tensor, Tensor)
    )
    weights = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    return {
        "weights": weights,
        "state": state,
        "kept": sum(first) - state,
        "peak": max(accumulate(later), default=0),
        "buffers": sum(each.exchange.nbytes for each in optimizer.bind().sets),
        "largest": max(later, default=0),
    }


def _allocations(run: Callable[[], object], device: str) -> list[int]:
    """Returns the bytes of each of torch's allocations, in order; frees are negative."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    dist.barrier()
    with profile(activities=kinds, profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    allocations = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name.lower() == device
    ]
    return [nbytes for _, nbytes in sorted(allocations, key=lambda pair: pair[0])]


def _row(topology: Topology, fraction: Fraction, ranks: Sequence[Needs]) -> Row:
    most = {name: max(needs[name] for needs in ranks) for name in ranks[0]}
    # AdamW's state has two numbers for each of a rank's weights.
    to_adamw = max(needs["state"] / (2 * needs["weights"]) for needs in ranks)
    return {
        "topology": str(topology),
        "fraction": str(fraction),
        **{f"{name}_MB": nbytes / MB for name, nbytes in most.items()},
        "state_to_adamw": to_adamw,
    }


if __name__ == "__main__":
    main()
