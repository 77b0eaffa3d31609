"""What the planner says of memory, bytes and operations is what runs of a tiny model do."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dion import Dion, DionConfig
from megatron_dion_tools.plan.costs import activations, gradients_and_weights, memory, model_work
from megatron_dion_tools.plan.dion import dion
from megatron_dion_tools.plan.models import GptShape
from megatron_dion_tools.plan.stage import Optimizer, Run, Stage
from megatron_dion_tools.plan.topology import Topology
from megatron_dion_tools.plan.updates import Update, adamw, muon
from tests.distributed.tiny_gpt import DION, INSTANCES, MODEL, PP2, TP2, TRAINING
from tests.worlds import train, world

# What MODEL says.
SHAPE = GptShape(4, 72, 200, 4, 2, kv_channels=18, vocab=250, vocab_multiple=8, sequence=32)
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BF16 = DionConfig(momentum_dtype="bf16", factor_dtype="bf16", comm_dtype="bf16")
BF16_FLAGS = "--dion-momentum-dtype bf16 --dion-factor-dtype bf16 --dion-comm-dtype bf16"

ADAM = "--optimizer adam --use-distributed-optimizer"
MUON = "--optimizer muon --muon-tp-mode duplicated --use-distributed-optimizer"
# Flags, topology, optimizer, and what else differs.
Case = tuple[str, Topology, Optimizer, dict[str, Any]]
CASES: dict[str, Case] = {
    "adam-full-recompute": (
        f"{ADAM} {FULL}",
        Topology(),
        Optimizer("adamw"),
        {"recompute": "full"},
    ),
    "adam-tp2-pp2": (f"{ADAM} {TP2} {PP2}", Topology(tp=2, pp=2), Optimizer("adamw"), {}),
    "adam-tp2-dp2-overlap": (
        f"{ADAM} {TP2} {OVERLAP} 10000000 --recompute-granularity selective",
        Topology(tp=2, dp=2),
        Optimizer("adamw"),
        {"bucket_size": 10_000_000, "recompute": "selective"},
    ),
    "muon-tp2-dp2": (
        f"{MUON} {TP2}",
        Topology(tp=2, dp=2),
        Optimizer("muon", muon_tp_mode="duplicated"),
        {},
    ),
    "dion-dp2-overlap": (
        f"{' '.join(DION)} {OVERLAP} 20000",
        Topology(dp=2),
        Optimizer("dion"),
        {"bucket_size": 20000},
    ),
    "dion-tp2-dp2-bf16": (
        f"{' '.join(DION)} {TP2} {BF16_FLAGS}",
        Topology(tp=2, dp=2),
        Optimizer("dion", BF16),
        {},
    ),
    "dion-pp2-dp2": (f"{' '.join(DION)} {PP2}", Topology(pp=2, dp=2), Optimizer("dion"), {}),
    "dion-compressed": (
        f"{' '.join(DION)} {INSTANCES} --dion-compressed-sync",
        Topology(dp=4, instances=2),
        Optimizer("dion", compressed_sync=True),
        {},
    ),
}
QUICK = ("adam-tp2-dp2-overlap", "dion-tp2-dp2-bf16")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_a_run(name: str) -> None:
    flags, topology, optimizer, changes = CASES[name]
    values = {"shape": SHAPE, "bucket_size": 0, "recompute": "none", **changes}
    run = Run(topology=topology, optimizer=optimizer, global_batch=12, **values)
    argv = [*MODEL, *TRAINING, *flags.split(), "--bf16", "--micro-batch-size", "1"]
    records = world(topology.tp * topology.pp * topology.dp).fork(
        train_counted, [*argv, "--train-iters", "3"]
    )
    for index in range(topology.pp):
        stage = Stage(run, index)
        ranks = [record for record in records if record["stage"] == index]
        update = {"adamw": adamw, "muon": muon, "dion": dion}[optimizer.kind](stage)
        if optimizer.kind == "adamw":  # its step has no products
            assert_operations(stage, ranks)
        assert_memory(stage, update, ranks)
        assert_bytes(stage, update, ranks)


def assert_operations(stage: Stage, ranks: list[dict[str, Any]]) -> None:
    """Megatron's local attention computes all pairs, of which the causal half counts."""
    shape, run = stage.run.shape, stage.run
    pairs = 2 * shape.sequence**2 * shape.heads * shape.head // run.topology.tp * len(stage.layers)
    planned = sum(model_work(stage)) + (3 + (run.recompute != "none")) * pairs
    counted = sum(record["operations"] for record in ranks) / len(ranks)
    assert counted == pytest.approx(planned * run.micro_batches, rel=0.01)


def assert_memory(stage: Stage, update: Update, ranks: list[dict[str, Any]]) -> None:
    """By kind, on the rank with most; what is padding and unevenness is not planned."""
    planned = memory(stage, update)
    counted = {kind: max(record["memory"][kind] for record in ranks) for kind in planned}
    for kind, spare in {"weights": 0.02, "gradients": 0.02, "right factors": 0.08}.items():
        assert counted[kind] == pytest.approx(planned[kind], rel=spare), kind
    for of in (counted, planned):
        of["states"] = sum(of[kind] for kind in ("masters", "momenta", "scalars"))
    # Muon's embedding lies on one rank.
    spare = 0.2 if stage.run.optimizer.kind == "muon" else 0.02
    assert counted["states"] == pytest.approx(planned["states"], rel=spare)
    assert counted["exchange"] == planned["exchange"]


def assert_bytes(stage: Stage, update: Update, ranks: list[dict[str, Any]]) -> None:
    """Of Dion's step and of the rest, by link, on the rank that sends most."""
    of_megatron: Counter[str] = Counter()
    for one in [*gradients_and_weights(stage), *activations(stage)]:
        of_megatron[one.group.link] += int(one.bytes)
    of_step: Counter[str] = Counter()
    for one in update.collectives:
        of_step[one.group.link] += int(one.bytes)
    if stage.run.optimizer.kind == "muon":  # it gathers within its step
        of_megatron, of_step = of_megatron + of_step, Counter()
        del of_megatron["data"]  # shares are unequal, and padded to the largest on a CPU
    for when, planned in (("megatron", of_megatron), ("dion", of_step)):
        for link, expected in planned.items():
            counted = max(record["sent"][when, link] for record in ranks)
            # An all_reduce of few bytes is not divisible by the ranks.
            tolerance = {"rel": 0.02} if when == "megatron" else {"abs": 32}
            assert counted == pytest.approx(expected, **tolerance), (when, link)


def train_counted(argv: Sequence[str]) -> dict[str, Any]:
    """What a rank has in the third iteration, and what it sent and computed in the second."""
    from megatron.core import parallel_state as state
    from megatron.training import training
    from torch.utils.flop_counter import FlopCounterMode

    sent: Counter[tuple[str, tuple[int, ...]]] = Counter()
    count_collectives(sent)
    record: dict[str, Any] = {}
    iterations = 0
    train_step = training.train_step

    @wraps(train_step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal iterations
        iterations += 1
        if iterations == 3:
            record["memory"] = memory_of(args[2], args[3])
        before = Counter(sent)
        with FlopCounterMode(display=False) as counter:
            result = train_step(*args, **kwargs)
        if iterations == 2:
            record["sent"] = by_link(sent - before, groups_of_rank())
            record["operations"] = counter.get_total_flops()
            record["stage"] = state.get_pipeline_model_parallel_rank()
        return result

    step = Dion.step

    def marked(*args: Any, **kwargs: Any) -> Any:
        IN_STEP.append(True)
        result = step(*args, **kwargs)
        IN_STEP.pop()
        return result

    Dion.step = marked  # type: ignore[method-assign]
    training.train_step = counted
    train(argv)
    return record


IN_STEP: list[bool] = []
"""Not empty while a Dion optimizer steps."""


def groups_of_rank() -> dict[tuple[int, ...], str]:
    """The link of each group of several ranks."""
    from megatron.core import parallel_state as state

    groups = {
        "tensor": state.get_tensor_model_parallel_group(),
        "data": state.get_data_parallel_group(
            with_context_parallel=True, partial_data_parallel=True
        ),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "replicas": state.get_inter_distributed_optimizer_instance_group(check_initialized=False),
    }
    ranks = {
        link: tuple(dist.get_process_group_ranks(group))
        for link, group in groups.items()
        if group is not None
    }
    return {members: link for link, members in ranks.items() if len(members) > 1}


def by_link(
    sent: Counter[tuple[str, tuple[int, ...]]], links: dict[tuple[int, ...], str]
) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for (when, ranks), count in sent.items():
        found[when, links.get(ranks, "other")] += count
    return found


def count_collectives(sent: Counter[tuple[str, tuple[int, ...]]]) -> None:
    """Counts what this process hands to process groups, as rings send it, by ranks."""

    def wrap(name: str, bytes_sent: Callable[..., float]) -> None:
        stock = getattr(dist.ProcessGroup, name)

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            ranks = tuple(dist.get_process_group_ranks(self))
            when = "dion" if IN_STEP else "megatron"
            sent[when, ranks] += int(bytes_sent(self, len(ranks), *args))
            return stock(self, *args, **kwargs)

        setattr(dist.ProcessGroup, name, counting)

    def total(given: Any) -> int:
        return sum(t.nbytes for t in given) if isinstance(given, list) else given.nbytes

    def reduced(_: Any, k: int, given: Any, *more: Any) -> float:
        return 2 * total(given) * (k - 1) / k

    def gathered(_: Any, k: int, received: Any, given: Any, *more: Any) -> float:
        return total(given) * (k - 1)

    def scattered(_: Any, k: int, received: Any, given: Any, *more: Any) -> float:
        whole = given[0] if isinstance(given[0], list) else given
        return total(whole) * (k - 1) / k

    def exchanged(
        group: Any, k: int, _: Any, given: Any, received: list[int], sizes: list[int], *more: Any
    ) -> float:
        own = sizes[group.rank()] / sum(sizes) if sum(sizes) else 1 / k
        return given.nbytes * (1 - own)

    for name in ("allreduce", "allreduce_coalesced"):
        wrap(name, reduced)
    for name in ("allgather", "all_gather_single", "all_gather_single_coalesced"):
        wrap(name, gathered)
    for name in ("reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced"):
        wrap(name, scattered)
    wrap("all_to_all_single", exchanged)
    wrap("send", lambda group, k, given, *_: total(given))


def memory_of(models: Any, chain: Any) -> Counter[str]:
    """Bytes of tensors by kind; masters and moments of Muon and AdamW count as masters."""
    found: Counter[str] = Counter()
    for model in models:
        for buffer in model.buffers:
            weights = list(buffer.params) if buffer.param_data is None else [buffer.param_data]
            found["weights"] += sum(tensor.nbytes for tensor in weights)
            found["gradients"] += buffer.grad_data.nbytes
    kinds = {"right_factor": "right factors"}
    for optimizer in getattr(chain, "chained_optimizers", [chain]):
        groups = getattr(optimizer, "shard_fp32_from_float16_groups", None)
        if groups is None:
            groups = optimizer.fp32_from_float16_groups
        found["masters"] += sum(t.nbytes for group in groups for t in group if t is not None)
        for state in optimizer.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    found[kinds.get(name, "masters")] += value.nbytes
        if isinstance(optimizer.optimizer, Dion):
            sets = [each.exchange.nbytes for each in optimizer.optimizer.bind().sets]
            found["exchange"] += sum(sorted(sets)[-2:])
    return found
