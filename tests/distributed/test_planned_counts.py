"""What the planner says of memory and of bytes is what runs of a tiny model have and send."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron_dion.sharding.memory import peak_bytes
from megatron_dion_tools.report.plan import planned_run

from megatron_dion import Dion, DionConfig
from megatron_dion.algorithm import IN_FLIGHT
from megatron_dion_tools.plan.hardware import PRESETS
from megatron_dion_tools.plan.memory import memory
from megatron_dion_tools.plan.models import Experts, GptShape
from megatron_dion_tools.plan.prediction import predict
from megatron_dion_tools.plan.stage import Optimizer, Run, Stage
from megatron_dion_tools.plan.topology import Batch, Topology
from megatron_dion_tools.plan.traffic import traffic
from megatron_dion_tools.report.folder import read_folder
from megatron_dion_tools.report.page import render
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, train
from tests.pages import Page

# What MODEL says.
SHAPE = GptShape(
    layers=4,
    hidden=72,
    ffn=200,
    heads=4,
    query_groups=2,
    kv_channels=18,
    vocab=250,
    vocab_multiple=8,
    sequence=32,
)

# With biases, LayerNorm, learned positions and tied embeddings.
LLAMA = ("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights")
GPT2 = [flag for flag in MODEL if flag not in LLAMA]
GPT2 += "--position-embedding-type learned_absolute --normalization LayerNorm".split()
GPT2_SHAPE = replace(SHAPE, gated=False, tied=True, biases=True, layer_norm=True, positions=32)


# In the first iterations `auto` leaves some P to triangles, which is not planned.
SURE = DionConfig(orthonormalizer="rcqr")


def train_counted(argv: Sequence[str]) -> dict[str, Any]:
    """On a rank: trains; what it has in the third iteration, and what it sent in the second."""
    from megatron.training import training

    sent: Counter[tuple[str, tuple[int, ...]]] = Counter()
    count_collectives(sent)
    before: list[Counter[tuple[str, tuple[int, ...]]]] = []
    found: dict[str, Any] = {}
    train_step = training.train_step

    @wraps(train_step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        before.append(Counter(sent))
        if len(before) == 3:
            found.update(place_of_rank(), memory=memory_of(args[2], args[3]))
            found["exchange"] = exchange_of(args[3])
        return train_step(*args, **kwargs)

    training.train_step = counted
    train(argv)
    return {**found, "sent": before[2] - before[1]}


def place_of_rank() -> dict[str, Any]:
    from megatron.core import parallel_state as state

    groups = {
        "experts": state.get_expert_data_parallel_group(partial_expert_data_parallel=True),
        "tensor": state.get_tensor_model_parallel_group(),
        "data": state.get_data_parallel_group(
            with_context_parallel=True, partial_data_parallel=True
        ),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "instances": state.get_inter_distributed_optimizer_instance_group(check_initialized=False),
    }
    return {
        "stage": state.get_pipeline_model_parallel_rank(),
        "place": (groups["data"].rank(), state.get_tensor_model_parallel_rank()),
        "groups": {
            name: tuple(dist.get_process_group_ranks(group))
            for name, group in groups.items()
            if group is not None
        },
    }


def count_collectives(sent: Counter[tuple[str, tuple[int, ...]]]) -> None:
    """Counts what this process hands to process groups, as rings send it, by call and ranks."""

    def wrap(name: str, kind: str, bytes_sent: Callable[..., int]) -> None:
        stock = getattr(dist.ProcessGroup, name)

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            ranks = tuple(dist.get_process_group_ranks(self))
            sent[kind, ranks] += bytes_sent(len(ranks), *args)
            return stock(self, *args, **kwargs)

        setattr(dist.ProcessGroup, name, counting)

    def each(factor: int, tensors: Any, k: int) -> int:
        return sum(factor * tensor.nbytes * (k - 1) // k for tensor in tensors)

    def between(
        k: int, _: Any, given: Any, received: list[int], sizes: list[int], *more: Any
    ) -> int:
        return given.nbytes if len(sizes) else given.nbytes * (k - 1) // k

    # The exchange's all_to_alls have nothing for the rank itself.
    wrap("all_to_all_single", "all-to-all", between)
    wrap("allreduce", "all-reduce", lambda k, given, *_: each(2, given, k))
    wrap("allreduce_coalesced", "all-reduce", lambda k, given, *_: each(2, given, k))
    wrap("all_gather_single", "gather", lambda k, _, given, *more: given.nbytes * (k - 1))
    wrap("reduce_scatter_single", "scatter", lambda k, _, given, *more: each(1, [given], k))
    wrap(
        "all_gather_single_coalesced",
        "gather",
        lambda k, _, given, *more: sum(t.nbytes for t in given) * (k - 1),
    )
    wrap("reduce_scatter", "scatter", lambda k, _, given, *more: each(1, given[0], k))
    wrap("reduce_scatter_single_coalesced", "scatter", lambda k, _, given, *more: each(1, given, k))
    wrap("allgather", "gather", lambda k, _, given, *more: sum(t.nbytes for t in given) * (k - 1))
    wrap("send", "send", lambda k, given, *_: sum(t.nbytes for t in given))


def memory_of(models: Any, chain: Any) -> Counter[str]:
    """Bytes of tensors by kind."""
    found: Counter[str] = Counter()
    for model in models:
        for buffer in [*model.buffers, *model.expert_parallel_buffers]:
            weights = list(buffer.params) if buffer.param_data is None else [buffer.param_data]
            found["weights"] += sum(tensor.nbytes for tensor in weights)
            found["gradients"] += buffer.grad_data.nbytes
    if type(chain).__name__ != "DionChainedOptimizer":
        found["masters and moments"] = sum(state_of(o) for o in chain.chained_optimizers)
        return found
    for optimizer in chain.chained_optimizers:
        masters = [t for group in optimizer.shard_fp32_from_float16_groups for t in group]
        states = [t for state in optimizer.optimizer.state.values() for t in state.items()]
        is_dion = type(optimizer).__name__ == "DionDistributedOptimizer"
        found["masters" if is_dion else "scalars"] += sum(t.nbytes for t in masters)
        names = {"momentum": "momenta", "right_factor": "right factors"}
        for name, tensor in states:
            if name in names or name in ("exp_avg", "exp_avg_sq"):
                found[names.get(name, "scalars")] += tensor.nbytes
    return found


def exchange_of(chain: Any) -> list[int]:
    """Bytes of the buffers of each Dion optimizer's sets that are under way at a time, the most."""
    return [
        sum(
            sorted(peak_bytes(chosen.plan, chosen.replicas) for chosen in dion.step_sets())[
                -IN_FLIGHT:
            ]
        )
        for optimizer in chain.chained_optimizers
        if isinstance(dion := optimizer.optimizer, Dion)
    ]


def assert_exchange(records: list[dict[str, Any]], stage: Stage) -> None:
    """A figure for all ranks of a stage; each optimizer's is that of its busiest rank."""
    on_ranks = [record["exchange"] for record in records if record["stage"] == stage.index]
    busiest = sum(max(peaks) for peaks in zip(*on_ranks, strict=True))
    assert memory(stage)["exchange"].max() == busiest > 0


def state_of(optimizer: Any) -> int:
    """Bytes of float32 masters and of moments, in any of Megatron's optimizers."""
    groups = getattr(optimizer, "shard_fp32_from_float16_groups", None)
    if groups is None:
        groups = optimizer.fp32_from_float16_groups
    masters = [tensor for group in groups for tensor in group if tensor is not None]
    states = [t for state in optimizer.optimizer.state.values() for t in state.values()]
    return sum(t.nbytes for t in [*masters, *states] if isinstance(t, torch.Tensor) and t.dim())


def planned(run: Run, stage: int, batch: Batch, place: tuple[int, int]) -> dict[str, int]:
    """By kind of call and group, what a rank of the stage sends."""
    found: Counter[str] = Counter()
    for name, sent in traffic(Stage(run, stage), batch).items():
        here = np.broadcast_to(sent.bytes, (run.topology.data().size, run.topology.tp))[place]
        found[KINDS[name]] += int(here)
    return found


# Kind of call and group, of dense models.
KINDS = {
    "gradients reduce-scatter": "scatter data",
    "gradients all-reduce": "all-reduce data",
    "muon gathers": "gather and scatter tensor",
    "weights all-gather": "gather data",
    "instances all-reduce": "all-reduce instances",
    "tensor-parallel activations": "gather and scatter tensor",
    "sums of embeddings": "all-reduce tensor",
    "tensor-parallel loss": "all-reduce tensor",
    "gradients of parts": "all-reduce tensor",
    "tied embeddings": "all-reduce pipeline",
    "pipeline sends": "send pipeline",
    "dion tensor rows": "all-reduce tensor",
    "dion tensor gather": "gather and scatter tensor",
    "dion tensor left": "all-to-all tensor",
    "dion tensor parts": "all-to-all tensor",
    "dion tensor right": "all-to-all tensor",
    "dion tensor flags": "all-reduce tensor",
    "dion data rows": "all-to-all data",
    "dion data left": "all-to-all data",
    "dion data parts": "all-to-all data",
    "dion data right": "all-to-all data",
    "dion data flags": "all-reduce data",
    "dion replicas": "all-reduce instances",
    "dion gradients": "all-reduce instances",
    "dion gradient norm": "all-reduce instances",
}


def counted(record: dict[str, Any]) -> Counter[str]:
    """By kind of call and group, what a rank has sent."""
    found: Counter[str] = Counter()
    # Where there are no experts their group has the ranks of the dense weights', which comes later.
    names = {ranks: name for name, ranks in record["groups"].items() if len(ranks) > 1}
    for (kind, ranks), sent in record["sent"].items():
        group = names.get(ranks, "other")
        joined = (
            "gather and scatter" if group == "tensor" and kind in ("gather", "scatter") else kind
        )
        found[f"{joined} {group}"] += sent
    return found


TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size"
INSTANCES = "--num-distributed-optimizer-instances 2"
BF16_DION = "--dion-momentum-dtype bf16 --dion-factor-dtype bf16 --dion-comm-dtype bf16"
# Flags, topology, and what else differs.
CASES: dict[str, tuple[str, Topology, dict[str, Any]]] = {
    "dp2": ("--bf16", Topology(dp=2), {}),
    "dp2-fp32": (f"{OVERLAP} 20000", Topology(dp=2), {"weight_bytes": 4, "bucket_size": 20000}),
    "tp2-dp2": (f"--bf16 {TP2}", Topology(tp=2, dp=2), {}),
    "tp2-dp2-bf16": (
        f"--bf16 {TP2} {BF16_DION}",
        Topology(tp=2, dp=2),
        {
            "optimizer": Optimizer(
                "dion",
                replace(SURE, momentum_dtype="bf16", factor_dtype="bf16", comm_dtype="bf16"),
            )
        },
    ),
    "gpt2-tp2-dp2": (f"--bf16 {TP2}", Topology(tp=2, dp=2), {}),
    "gpt2-pp2-dp2": (f"--bf16 {PP2}", Topology(pp=2, dp=2), {}),
    "gpt2-tp2-pp2": (f"--bf16 {TP2} {PP2}", Topology(tp=2, pp=2), {}),
    "pp2-dp2": (f"--bf16 {PP2} {OVERLAP} 20000", Topology(pp=2, dp=2), {"bucket_size": 20000}),
    "instances": (f"--bf16 {INSTANCES}", Topology(dp=4, instances=2), {}),
    "compressed": (
        f"--bf16 {INSTANCES} --dion-compressed-sync",
        Topology(dp=4, instances=2),
        {"optimizer": Optimizer("dion", SURE, compressed_sync=True)},
    ),
}


OTHERS: dict[str, tuple[str, Topology, Optimizer]] = {
    "adam dp2": ("--optimizer adam", Topology(dp=2), Optimizer("adamw")),
    "adam tp2-dp2": (f"--optimizer adam {TP2}", Topology(tp=2, dp=2), Optimizer("adamw")),
    "muon dp2": ("--optimizer muon", Topology(dp=2), Optimizer("muon", layer_wise_layout=False)),
    "muon tp2-dp2": (
        f"--optimizer muon --muon-tp-mode duplicated {TP2}",
        Topology(tp=2, dp=2),
        Optimizer("muon", muon_tp_mode="duplicated", layer_wise_layout=False),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_memory_and_bytes_of_other_optimizers(nursery: Nursery, tmp_path: Path, name: str) -> None:
    flags, topology, optimizer = OTHERS[name]
    run = Run(SHAPE, topology, optimizer, bucket_size=0)
    argv = [*MODEL, *TRAINING, "--use-distributed-optimizer", "--bf16", *flags.split()]
    argv += f"--micro-batch-size 1 --log-interval 100 --run-dir {tmp_path} --train-iters 4".split()
    stage = Stage(run, 0)
    for record in nursery.run(topology.world, train_counted, argv):
        place = record["place"]
        kept = {kind: int(sizes[place]) for kind, sizes in memory(stage).items()}
        assert record["memory"] == {
            "weights": kept["weights"],
            "gradients": kept["gradients"],
            "masters and moments": kept["masters"] + kept["momenta"] + kept["scalars"],
        }
        expected = planned(run, 0, Batch(1, 12), place)
        if optimizer.kind == "muon":  # its shards are unequal: on CPU padded to the largest
            [section] = stage.sections
            largest = int(section.held(lambda _: True).max())
            expected["gather data"] = 2 * largest * (topology.dp - 1)
        assert_sent(counted(record), expected)


def assert_sent(sent: Counter[str], expected: dict[str, int]) -> None:
    for kind in sent.keys() | expected.keys():
        # Single numbers besides: norms, losses, whether a gradient was infinite.
        spare = 64 if kind.startswith("all-reduce") else 0
        if not kind.endswith("other"):
            assert 0 <= sent[kind] - expected[kind] <= spare, kind


@pytest.mark.parametrize("name", CASES)
def test_memory_and_bytes(nursery: Nursery, tmp_path: Path, name: str) -> None:
    flags, topology, changes = CASES[name]
    model, shape = (GPT2, GPT2_SHAPE) if name.startswith("gpt2") else (MODEL, SHAPE)
    run = Run(
        shape, topology, **{"optimizer": Optimizer("dion", SURE), "bucket_size": 0, **changes}
    )
    argv = [*model, *TRAINING, *DION, *flags.split(), "--train-iters", "4"]
    argv += ["--dion-orthonormalizer", SURE.orthonormalizer]
    argv += f"--micro-batch-size 1 --log-interval 100 --run-dir {tmp_path}".split()
    records = nursery.run(topology.world, train_counted, argv)
    assert len({record["stage"] for record in records}) == topology.pp
    for record in records:
        stage, place = record["stage"], record["place"]
        kept = {kind: int(sizes[place]) for kind, sizes in memory(Stage(run, stage)).items()}
        del kept["exchange"]
        assert {kind: record["memory"][kind] for kind in kept} == kept
        assert_sent(counted(record), planned(run, stage, Batch(1, 12), place))
    for stage in range(topology.pp):
        assert_exchange(records, Stage(run, stage))
    check_report(tmp_path, run)


def check_report(run_dir: Path, run: Run) -> None:
    """The report plans the run that it was, and says what the run itself has counted."""
    told, batch = planned_run(read_folder(run_dir).arguments)
    assert batch == Batch(1, 12, "none")
    of_report, expected = (predict(one, batch, PRESETS["cpu"]) for one in (told, run))
    assert of_report.memory == expected.memory
    assert of_report.collectives == expected.collectives
    said = " ".join(Page(render(read_folder(run_dir))).texts("p"))
    [(by_plan, by_run)] = re.findall(r"step sends (\S+ \w+) .* planned, (\S+ \w+)", said)
    assert by_plan == by_run


MOE = replace(SHAPE, experts=Experts(count=4, top_k=2, ffn=40, shared_ffn=48))
MOE_FLAGS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 40"
    " --moe-shared-expert-intermediate-size 48 --moe-router-load-balancing-type none"
    " --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2"
)


@pytest.mark.parametrize(("flags", "bucket_size"), [("", 0), (f"{OVERLAP} 20000", 20000)])
def test_adamw_with_experts(nursery: Nursery, tmp_path: Path, flags: str, bucket_size: int) -> None:
    """Without overlap all weights are gathered twice."""
    run = Run(MOE, Topology(dp=4, ep=2), Optimizer("adamw"), bucket_size)
    argv = [*MODEL, *TRAINING, *MOE_FLAGS.split(), *flags.split(), "--train-iters", "4"]
    argv += "--optimizer adam --use-distributed-optimizer --bf16 --micro-batch-size 1".split()
    argv += f"--log-interval 100 --run-dir {tmp_path}".split()
    planned_bytes = traffic(Stage(run, 0), Batch(1, 12))
    for record in nursery.run(4, train_counted, argv):
        sent = counted(record)
        for call, name in (
            ("scatter", "gradients reduce-scatter"),
            ("gather", "weights all-gather"),
        ):
            assert sent[f"{call} data"] + sent[f"{call} experts"] == planned_bytes[name].bytes


def test_memory_and_bytes_of_experts(nursery: Nursery, tmp_path: Path) -> None:
    run = Run(MOE, Topology(dp=4, ep=2), Optimizer("dion", SURE), bucket_size=0)
    argv = [*MODEL, *TRAINING, *DION, *MOE_FLAGS.split(), "--bf16", "--train-iters", "4"]
    argv += ["--dion-orthonormalizer", SURE.orthonormalizer]
    argv += f"--micro-batch-size 1 --log-interval 100 --run-dir {tmp_path}".split()
    stage = Stage(run, 0)
    of_data_ranks = {"all-to-all": ("left", "parts", "rows", "right"), "all-reduce": ("flags",)}
    records = nursery.run(4, train_counted, argv)
    assert_exchange(records, stage)
    for record in records:
        place = record["place"]
        kept = {kind: int(sizes[place]) for kind, sizes in memory(stage).items()}
        del kept["exchange"]
        assert {kind: record["memory"][kind] for kind in kept} == kept
        sent = counted(record)
        planned_bytes = traffic(stage, Batch(1, 12))
        for call, kinds in of_data_ranks.items():
            expected = [
                np.broadcast_to(planned_bytes[name].bytes, (4, 1))[place]
                for name in (f"dion data {kind}" for kind in kinds)
                if name in planned_bytes
            ]
            spare = 64 if call == "all-reduce" else 0
            assert 0 <= sent[f"{call} data"] + sent[f"{call} experts"] - sum(expected) <= spare
        for call, name in (
            ("scatter", "gradients reduce-scatter"),
            ("gather", "weights all-gather"),
        ):
            assert sent[f"{call} data"] + sent[f"{call} experts"] == planned_bytes[name].bytes
    check_report(tmp_path, run)
