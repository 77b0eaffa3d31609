"""How many bytes does an iteration send, by collective, and are Dion's those of its plan?

Trains a small GPT with Megatron on forked ranks (gloo). Every collective of the gradient sync, the
optimizer's step and the gather of weights is counted where torch.distributed is called, as a ring
sends it. Figures are of the last of three iterations, bytes of all ranks together. `megatron-dion
plan` computes the bytes of models that are too large to run here.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch.distributed as dist

from benchmarks._common import Gone, Row, make_parser, parse, report
from megatron_dion import Dion
from megatron_dion_tools.local.preload import preload
from megatron_dion_tools.local.world import run_world

MODEL = (
    "--hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4"
    " --group-query-attention --num-query-groups 2 --seq-length 16 --max-position-embeddings 16"
    " --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
    " --untie-embeddings-and-output-weights --mock-data --tokenizer-type NullTokenizer"
    " --vocab-size 250 --make-vocab-size-divisible-by 8 --padded-vocab-size 256"
    " --micro-batch-size 1 --global-batch-size 12 --lr 1e-3 --train-iters 3 --log-interval 10"
    " --eval-iters 0 --eval-interval 1000 --use-distributed-optimizer --bf16 --device cpu"
)
BUCKETS = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size"
INSTANCES = "--num-distributed-optimizer-instances 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
DION = "--optimizer dion --dion-rank-fraction"
# Muon in float32 sends the same bytes, sooner on a CPU without bf16 instructions.
MUON = "--optimizer muon --muon-tp-mode duplicated --muon-fp32-matmul-prec high"
# Ranks and flags. Two or four ranks hold whole matrices of four equal layers in one bucket; three
# layers are cut.
CASES = {
    "DP2, whole matrices": (2, "--num-layers 4"),
    "DP4, whole matrices": (4, "--num-layers 4"),
    "DP4": (4, "--num-layers 3"),
    "DP4, 4 buckets": (4, f"--num-layers 4 {BUCKETS} 700000"),
    "TP2": (2, f"--num-layers 4 {TP2}"),
    "TP2 x DP2": (4, f"--num-layers 3 {TP2}"),
    "2 instances": (2, f"--num-layers 4 {INSTANCES}"),
    "2 instances x TP2": (4, f"--num-layers 4 {INSTANCES} {TP2}"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints bytes and collectives of each case, by optimizer."""
    parser = make_parser(__doc__, repeats=1, devices=["cpu"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--fraction", type=Fraction, default=Fraction(1, 4), help="rank fraction")
    parser.add_argument("--large", action=Gone, const="use `megatron-dion plan`")
    args = parse(parser, argv)
    preload()
    rows = [row for case in args.cases for row in _rows(case, args)]
    calls = [dict(call) for row in rows for call in row.pop("calls")]
    report(args, [("bytes", rows), ("calls", calls)])


@dataclass
class Sent:
    """What a rank sends to other ranks in an iteration.

    Attributes:
        sync: bytes of Megatron's gradient sync and gather of weights, by collective.
        step: bytes of all else in the optimizer's step, by collective.
        calls: collectives of the step, gather of weights included.
        planned: bytes that Dion plans to send in a step, by group.
    """

    sync: Counter[str] = field(default_factory=Counter)
    step: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    planned: Counter[str] = field(default_factory=Counter)


def _rows(case: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    ranks, flags = CASES[case]
    dion = f"{DION} {float(args.fraction)}"
    optimizers = {"AdamW": "--optimizer adam", "Dion": dion}
    if INSTANCES in flags:
        optimizers["Dion, compressed sync"] = f"{dion} --dion-compressed-sync"
    elif BUCKETS not in flags:
        optimizers["Muon"] = MUON
    adamw = 0  # bytes of its gradient sync
    for optimizer, choice in optimizers.items():
        sent = run_world(ranks, count_iteration, f"{MODEL} {flags} {choice}".split())
        sync = sum((rank.sync for rank in sent), Counter[str]())
        step = sum((rank.step for rank in sent), Counter[str]())
        planned = sum((rank.planned for rank in sent), Counter[str]())
        total = sync.total() + step.total()
        adamw = adamw or sync.total()
        yield {
            "case": case,
            "optimizer": optimizer,
            "sync_kB": sync.total() / 1e3,
            "step_kB": step.total() / 1e3,
            "planned_kB": planned.total() / 1e3,
            "to_adamw": total / adamw if adamw else None,
            "calls": list(_calls(case, optimizer, sent[0].calls, step)),
        }


def _calls(
    case: str, optimizer: str, calls: Mapping[str, int], sent: Mapping[str, int]
) -> Iterator[Row]:
    for name, number in sorted(calls.items()):
        yield {
            "case": case,
            "optimizer": optimizer,
            "collective": name,
            "calls_of_a_rank": number,
            "kB_of_all_ranks": sent[name] / 1e3,
        }


def count_iteration(argv: Sequence[str]) -> Sent:
    """Trains on a rank, and returns what it sent in the last iteration."""
    from megatron_dion.megatron.launch import train

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sent = Sent()
    optimizers: list[Dion] = []
    distribute = Dion.distribute

    def noted(self: Dion, distribution: Any) -> None:
        optimizers.append(self)
        distribute(self, distribution)

    Dion.distribute = noted  # type: ignore[method-assign]
    _count(sent)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        train([*argv, "--run-dir", folder])
    for optimizer in optimizers:
        for each in optimizer.bind().sets:
            sent.planned.update(each.exchange.bytes_sent())
    return sent


def _count(sent: Sent) -> None:
    """From now on counts every collective of gradient sync, step and gather of weights."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    phases: list[str] = []  # the innermost is the last
    for name, size in SIZES.items():
        setattr(dist, name, _counting(name, getattr(dist, name), size, phases, sent))
    # Bound when Megatron was imported.
    buffers.dist_all_gather_func = dist.all_gather_into_tensor
    buffers.dist_reduce_scatter_func = dist.reduce_scatter_tensor
    group = buffers._ParamAndGradBucketGroup
    for name in ("start_grad_sync", "finish_grad_sync", "start_param_sync"):
        setattr(group, name, _within("sync", getattr(group, name), phases))
    ChainedOptimizer.step = _within("step", ChainedOptimizer.step, phases)
    begin = DistributedDataParallel.zero_grad_buffer

    def begun(self: DistributedDataParallel) -> None:
        for counter in (sent.sync, sent.step, sent.calls):
            counter.clear()
        begin(self)

    DistributedDataParallel.zero_grad_buffer = begun


def _within(name: str, function: Callable[..., Any], phases: list[str]) -> Callable[..., Any]:
    @contextmanager
    def entered() -> Iterator[None]:
        phases.append(name)
        try:
            yield
        finally:
            phases.pop()

    return entered()(function)


def _counting(
    name: str,
    stock: Callable[..., Any],
    size: Callable[..., float],
    phases: list[str],
    sent: Sent,
) -> Callable[..., Any]:
    def counting(*args: Any, **options: Any) -> Any:
        if phases:
            group = options.get("group")
            number = int(size(dist.get_world_size(group), dist.get_rank(group), *args))
            (sent.sync if phases[-1] == "sync" else sent.step)[name] += number
            if "step" in phases:
                sent.calls[name] += 1
        return stock(*args, **options)

    return counting


# Bytes that a rank sends in a ring of k ranks; all_to_all: to others.
SIZES: dict[str, Callable[..., float]] = {
    "all_reduce": lambda k, me, tensor, *_: 2 * tensor.nbytes * (k - 1) / k,
    "all_gather_into_tensor": lambda k, me, gathered, tensor, *_: tensor.nbytes * (k - 1),
    "reduce_scatter_tensor": lambda k, me, share, tensor, *_: tensor.nbytes * (k - 1) / k,
    "all_gather": lambda k, me, gathered, tensor, *_: tensor.nbytes * (k - 1),
    "all_to_all_single": lambda k, me, received, tensor, _, sizes: (
        (sum(sizes) - sizes[me]) * tensor.itemsize
    ),
    "broadcast": lambda k, me, tensor, *_: tensor.nbytes * (k - 1) / k,
}


if __name__ == "__main__":
    main()
