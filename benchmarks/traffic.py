"""How many bytes does an iteration send, by collective, and how many more are they than AdamW's?

Iterations of Megatron in worlds of forked ranks (gloo). Every collective of gradient sync,
optimizer step and weight gather is counted where torch.distributed is called, as a ring sends it;
bytes and calls are those of the last of twenty iterations, bytes of all ranks together. `--large`
plans models of which nothing is run.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks._common import Goal, Row, make_parser, parse, report
from megatron_dion import Dion, DionConfig
from megatron_dion.sharding import Grid, Planner, Rank, sets_in_turn
from megatron_dion.sharding.lower_bound import (
    least_bytes_of_any_schedule,
    least_bytes_of_factors,
    least_bytes_of_sharing,
)
from megatron_dion.sharding.traffic import bytes_sent
from megatron_dion_tools.local.preload import preload
from megatron_dion_tools.local.world import run_world
from megatron_dion_tools.plan import PRESETS, default_bucket_size, place
from megatron_dion_tools.plan.stage import DionPart
from megatron_dion_tools.plan.topology import Topology
from megatron_dion_tools.plan.traffic import set_bytes

LIMIT = 1.05
SKETCH_BYTES = 65536  # the norm's count sketch, which two instances average
MODEL = (
    "--hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4"
    " --group-query-attention --num-query-groups 2 --seq-length 16 --max-position-embeddings 16"
    " --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
    " --untie-embeddings-and-output-weights --mock-data --tokenizer-type NullTokenizer"
    " --vocab-size 250 --make-vocab-size-divisible-by 8 --padded-vocab-size 256"
    " --micro-batch-size 1 --global-batch-size 12 --lr 1e-3 --train-iters 20 --log-interval 10"
    " --eval-iters 0 --eval-interval 1000 --use-distributed-optimizer --bf16 --device cpu"
).split()
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size"
INSTANCES = "--num-distributed-optimizer-instances 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"


METHODS = {
    "adam": "--optimizer adam",
    "dion": "--optimizer dion",
    "compressed": "--optimizer dion --dion-compressed-sync",
    # In float32: the same bytes, sooner on a CPU without bf16 instructions.
    "muon": "--optimizer muon --muon-tp-mode duplicated --muon-fp32-matmul-prec high",
}


@dataclass(frozen=True)
class Case:
    """A topology.

    Attributes:
        name: for people.
        ranks: number of processes.
        flags: of Megatron.
        others: methods of `METHODS` that are run beside AdamW and Dion.
    """

    name: str
    ranks: int
    flags: str
    others: tuple[str, ...] = ("muon",)

    @property
    def methods(self) -> tuple[str, ...]:
        return ("adam", "dion", *self.others)

    @property
    def instances(self) -> int:
        return 2 if INSTANCES in self.flags else 1


# Four equal layers in one bucket: two and four ranks hold whole matrices. Three layers are cut.
CASES = (
    Case("one process", 1, "--num-layers 4"),
    Case("DP2, whole matrices", 2, "--num-layers 4"),
    Case("DP4, whole matrices", 4, "--num-layers 4"),
    Case("DP2", 2, "--num-layers 3"),
    Case("DP4", 4, "--num-layers 3"),
    Case("DP4, 4 buckets", 4, f"--num-layers 4 {OVERLAP} 700000", ()),
    Case("DP4, 8 buckets", 4, f"--num-layers 4 {OVERLAP} 330000", ()),
    Case("TP2", 2, f"--num-layers 4 {TP2}"),
    Case("TP2 x DP2, whole pieces", 4, f"--num-layers 4 {TP2}"),
    Case("TP2 x DP2", 4, f"--num-layers 3 {TP2}"),
    Case("2 instances", 2, f"--num-layers 4 {INSTANCES}", ("compressed",)),
    Case("2 instances x DP2", 4, f"--num-layers 3 {INSTANCES}", ("compressed",)),
    Case("2 instances x TP2", 4, f"--num-layers 4 {INSTANCES} {TP2}", ("compressed",)),
)
LINKS = ("tensor", "data")
LARGE = (("8B", 1, 1, (8, 64, 256)), ("70B", 8, 4, (8, 64, 256)), ("405B", 8, 14, (8, 64)))


def main(argv: Sequence[str] | None = None) -> None:
    """Print bytes and collectives of each case."""
    args = _parse(argv)
    tables: dict[str, Sequence[Row]] = {}
    goals: list[Goal] = []
    if args.large:
        tables["planned"] = [
            _planned(model, tp, pp, dp, one_bucket, args.fraction)
            for model, tp, pp, sizes in LARGE
            for dp in sizes
            for one_bucket in (True, False)
        ]
        goals = [goal for row in tables["planned"] for goal in _goals_of_links(row)]
    else:
        preload()
        found = [_compare(case, args.fraction) for case in args.cases]
        tables["bytes"] = [comparison.row() for comparison in found]
        tables["kinds"] = [row for comparison in found for row in comparison.rows_of_kinds()]
        tables["compressed sync"] = [
            comparison.row_of_compression()
            for comparison in found
            if "compressed" in comparison.sent
        ]
        tables["calls"] = [row for comparison in found for row in comparison.rows_of_calls()]
        goals = [goal for comparison in found for goal in comparison.goals()]
    report(args, tables, goals)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=1, devices=["cpu"])
    by_name = {case.name: case for case in CASES}
    parser.add_argument(
        "--cases", nargs="+", type=by_name.__getitem__, default=CASES, metavar="CASE"
    )
    parser.add_argument("--fraction", type=Fraction, default=Fraction(1, 4), help="rank fraction")
    parser.add_argument("--large", action="store_true", help="plan large models instead")
    return parse(parser, argv)


@dataclass
class Sent:
    """What a rank hands to collectives for other ranks in an iteration.

    Attributes:
        sync: bytes of Megatron's gradient sync and gather of weights, by collective.
        step: bytes of all else in the optimizer's step, by collective.
        calls: collectives in the step, gather of weights included.
        planned: bytes that Dion plans to send in a step, by kind.
        bound: the least that all ranks of an instance must send, by kind.
        any_bound: the same for schedules that may move momenta.
        compression: (m + n) r / mn, over all matrices.
    """

    sync: Counter[str] = field(default_factory=Counter)
    step: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    planned: Counter[str] = field(default_factory=Counter)
    bound: Counter[str] = field(default_factory=Counter)
    any_bound: int = 0
    compression: float = 0.0

    def clear(self) -> None:
        for counter in (self.sync, self.step, self.calls):
            counter.clear()


@dataclass(frozen=True)
class Comparison:
    """The ranks of a case, by method."""

    case: Case
    sent: Mapping[str, Sequence[Sent]]

    def sync(self, method: str) -> int:
        """Bytes of all ranks for gradients and weights."""
        return sum(sum(rank.sync.values()) for rank in self.sent[method])

    def step(self, method: str) -> int:
        """Bytes of all ranks for all else in the step."""
        return sum(sum(rank.step.values()) for rank in self.sent[method])

    def extra(self, method: str) -> int:
        """Bytes of all ranks beyond those of AdamW."""
        return self.sync(method) + self.step(method) - self.sync("adam") - self.step("adam")

    @property
    def planned(self) -> Counter[str]:
        return sum((rank.planned for rank in self.sent["dion"]), Counter())

    @property
    def bound(self) -> Counter[str]:
        """The least of Dion's exchange within each instance, of all of them together."""
        of_one = self.sent["dion"][0].bound
        return Counter({kind: self.case.instances * size for kind, size in of_one.items()})

    @property
    def to_bound(self) -> float | None:
        """Measured extra bytes to the bound."""
        return self.extra("dion") / self.bound.total() if self.bound.total() else None

    @property
    def compressed(self) -> float:
        """What averages factors, to what averages gradients, over instances; measured."""
        added = self.step("compressed") - self.step("dion") - len(self.sent["dion"]) * SKETCH_BYTES
        return added / (self.sync("dion") - self.sync("compressed"))

    def row(self) -> Row:
        adam = self.sync("adam")
        return {
            "case": self.case.name,
            "adamw_kB": adam / 1e3,
            "dion_extra_kB": self.extra("dion") / 1e3,
            "planned_kB": self.planned.total() / 1e3,
            "bound_kB": self.bound.total() / 1e3,
            "extra_to_bound": self.to_bound,
            "any_bound_kB": self.case.instances * self.sent["dion"][0].any_bound / 1e3,
            "extra_to_adamw": self.extra("dion") / adam if adam else None,
            "muon_extra_kB": self.extra("muon") / 1e3 if "muon" in self.sent else None,
        }

    def rows_of_kinds(self) -> Iterator[Row]:
        for kind in sorted(self.planned | self.bound):
            yield {
                "case": self.case.name,
                "kind": kind,
                "planned_kB": self.planned[kind] / 1e3,
                "bound_kB": self.bound[kind] / 1e3,
            }

    def rows_of_calls(self) -> Iterator[Row]:
        for method, ranks in self.sent.items():
            step, calls = sum((rank.step for rank in ranks), Counter()), ranks[0].calls
            for name in sorted(calls):
                yield {
                    "case": self.case.name,
                    "method": method,
                    "collective": name,
                    "calls_of_a_rank": calls[name],
                    "kB_of_all": step[name] / 1e3,
                }

    def row_of_compression(self) -> Row:
        dense = self.sync("dion") - self.sync("compressed")
        return {
            "case": self.case.name,
            "dense_kB": dense / 1e3,
            "compressed_kB": self.compressed * dense / 1e3,
            "ratio": self.compressed,
            "(m+n)r/mn": self.sent["compressed"][0].compression,
        }

    def goals(self) -> Iterator[Goal]:
        if self.to_bound is None:
            yield Goal(f"{self.case.name}: extra bytes of whole matrices", self.extra("dion"), 0)
        else:
            yield Goal(f"{self.case.name}: extra bytes / bound", self.to_bound, LIMIT)
        if "compressed" in self.sent:
            ratio = self.compressed / self.sent["compressed"][0].compression
            yield Goal(f"{self.case.name}: compressed / dense bytes / ((m+n)r/mn)", ratio, 1.0)


def _compare(case: Case, fraction: Fraction) -> Comparison:
    def argv(method: str) -> list[str]:
        flags = METHODS[method]
        if "--optimizer dion" in flags:
            flags += f" --dion-rank-fraction {float(fraction)}"
        return [*MODEL, *case.flags.split(), *flags.split()]

    return Comparison(case, {m: run_world(case.ranks, measure, argv(m)) for m in case.methods})


def measure(argv: Sequence[str]) -> Sent:
    """On a rank: trains and counts."""
    from megatron_dion.megatron.launch import train

    sent = Sent()
    found: list[tuple[Dion, Rank]] = []
    distribute = Dion.distribute

    def noted(self: Dion, distribution: Any) -> None:
        found.append((self, distribution.rank))
        distribute(self, distribution)

    Dion.distribute = noted  # type: ignore[method-assign]
    _count(sent)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        train([*argv, "--run-dir", folder])
    for optimizer, rank in found:
        _note_plan(sent, optimizer.planner(), rank)
    return sent


def _note_plan(sent: Sent, planner: Planner, rank: Rank) -> None:
    layout = planner.layout
    for plan in planner.plans(rank):
        sent.planned.update(bytes_sent(plan))
    sent.bound.update(least_bytes_of_factors(layout))
    sent.any_bound, _ = least_bytes_of_any_schedule(layout)
    factors = sum((m.rows + m.columns) * m.rank for m in layout.matrices)
    sent.compression = factors / sum(m.rows * m.columns for m in layout.matrices)


def _count(sent: Sent) -> None:
    """From now on every collective of gradient sync, step and gather is counted."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    phase: list[str] = []  # the innermost is the last
    for name, size in SIZES.items():
        setattr(dist, name, _counting(name, getattr(dist, name), size, phase, sent))
    # Bound when Megatron was imported.
    buffers.dist_all_gather_func = dist.all_gather_into_tensor
    buffers.dist_reduce_scatter_func = dist.reduce_scatter_tensor
    group = buffers._ParamAndGradBucketGroup
    for name in ("start_grad_sync", "finish_grad_sync", "start_param_sync"):
        setattr(group, name, _within("sync", getattr(group, name), phase))
    ChainedOptimizer.step = _within("step", ChainedOptimizer.step, phase)
    begin = DistributedDataParallel.zero_grad_buffer

    def begun(self: DistributedDataParallel) -> None:
        sent.clear()
        begin(self)

    DistributedDataParallel.zero_grad_buffer = begun


def _within(name: str, function: Callable[..., Any], phase: list[str]) -> Callable[..., Any]:
    @contextmanager
    def entered() -> Iterator[None]:
        phase.append(name)
        try:
            yield
        finally:
            phase.pop()

    return entered()(function)


def _counting(
    name: str,
    stock: Callable[..., Any],
    size: Callable[..., float],
    phase: list[str],
    sent: Sent,
) -> Callable[..., Any]:
    def counting(*args: Any, **options: Any) -> Any:
        if phase:
            group = options.get("group")
            number = int(size(dist.get_world_size(group), dist.get_rank(group), *args))
            (sent.sync if phase[-1] == "sync" else sent.step)[name] += number
            if "step" in phase:
                sent.calls[name] += 1
        return stock(*args, **options)

    return counting


# Bytes that a rank sends in a ring of k ranks; all_to_all: to others.
SIZES: dict[str, Callable[..., float]] = {
    "all_reduce": lambda k, me, tensor, *_: 2 * tensor.nbytes * (k - 1) / k,
    "all_gather_into_tensor": lambda k, me, gathered, tensor, *_: tensor.nbytes * (k - 1),
    "reduce_scatter_tensor": lambda k, me, tensor, *_: tensor.nbytes * (k - 1),
    "all_gather": lambda k, me, gathered, tensor, *_: tensor.nbytes * (k - 1),
    "all_to_all_single": lambda k, me, received, tensor, _, sizes: (
        (sum(sizes) - sizes[me]) * tensor.itemsize
    ),
    "broadcast": lambda k, me, tensor, *_: tensor.nbytes * (k - 1) / k,
}


def _planned(model: str, tp: int, pp: int, dp: int, one_bucket: bool, fraction: Fraction) -> Row:
    """The last pipeline stage, a rank's mean of all ranks, float32 exchange."""
    shape = PRESETS[model]
    weights = shape.weights(shape.stage_layers(pp, pp - 1), tp)
    placements = place(weights, dp, None if one_bucket else default_bucket_size(dp))
    grid = Grid(tp, dp)
    config = DionConfig(rank_fraction=float(fraction))
    sets = sets_in_turn(placements, range(len(placements)), grid.size)
    planner = Planner(placements, grid, config, sets)
    # With `qr` no P is divided.
    undivided = Planner(placements, grid, replace(config, orthonormalizer="qr"), sets)
    found = {
        "": _sent_by_all(planner),
        "undivided_": _sent_by_all(undivided),
        "bound_": least_bytes_of_factors(planner.layout),
        "sharing_": least_bytes_of_sharing(planner.layout, planner.charges),
    }
    _, any_far = least_bytes_of_any_schedule(planner.layout)
    numel = sum(p.weight.rows * p.weight.columns for p in placements)

    def megabytes(kinds: Mapping[str, int], link: str) -> float:
        return sum(v for k, v in kinds.items() if k.startswith(link)) / grid.size / 1e6

    def to_bound(link: str) -> float | None:
        bound = megabytes(found["bound_"], link) + megabytes(found["sharing_"], link)
        return megabytes(found[""], link) / bound if bound else None

    return {
        "model": model,
        "grid": f"TP{tp} x DP{dp}",
        "buckets": sum(placement.start == 0 for placement in placements),
        "adamw_MB": 6 * numel * (dp - 1) / dp / 1e6,  # gradients in fp32, weights in bf16
        **{
            f"{name}{link}_MB": megabytes(kinds, link)
            for link in LINKS
            for name, kinds in found.items()
        },
        **{f"{link}_to_bound": to_bound(link) for link in LINKS},
        "any_data_MB": any_far / grid.size / 1e6,
    }


def _goals_of_links(row: Row) -> Iterator[Goal]:
    for link in LINKS:
        ratio = row[f"{link}_to_bound"]
        if isinstance(ratio, float):
            name = f"{row['model']}, {row['grid']}, {row['buckets']} buckets: {link} bytes / bound"
            yield Goal(name, ratio, LIMIT)


def _sent_by_all(planner: Planner) -> Counter[str]:
    """Bytes of all ranks, by kind."""
    grid, sets = planner.layout.grid, planner.sets
    group = Topology(tp=grid.tensor_parallel_size, dp=grid.data_parallel_size).data()
    part = DionPart(planner, is_experts=False, group=group, replicas=(1,) * len(sets))
    sent: Counter[str] = Counter()
    for index in range(len(sets)):
        sent.update({kind: int(np.sum(of)) for kind, (of, _) in set_bytes(part, index).items()})
    return sent


if __name__ == "__main__":
    main()
