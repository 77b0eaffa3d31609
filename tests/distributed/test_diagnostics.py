"""Diagnostics on every grid: equal to dense ones, at a known price, and nothing when off."""

import csv
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_dion import DionConfig
from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion.optimizer.diagnostics import FIGURES, MatrixDiagnostics, read_diagnostics
from megatron_dion_tools.local.world import gloo_world
from tests.dense_diagnostics import DenseDiagnostics, step_and_measure
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, train
from tests.distributed.recording import save_start
from tests.distributed.test_collectives import COLLECTIVES, counting
from tests.distributed.test_sharded_dion import (
    LR,
    ODD,
    TRANSFORMER,
    WEIGHT_DECAY,
    Sent,
    Shape,
    Shards,
    World,
    counted_bytes,
    name_of,
    values,
)
from tests.reference import ReferenceMatrix

STEPS = 3
WORLDS = [World(*grid) for grid in [(1, 1), (2, 1), (1, 3), (2, 2), (1, 2, 2)]]


def diagnose(
    world: World, shapes: tuple[Shape, ...], config: DionConfig, watch: bool = True
) -> tuple[list[MatrixDiagnostics], Sent]:
    """On a rank: the last of three steps, of which all or none are measured, and what it sent."""
    shards = Shards(world, shapes, config, bucket=5000)
    for step in range(1, STEPS + 1):
        shards.set_gradients(values(shapes, step), step)
        if watch:
            shards.optimizer.take_diagnostics()
            shards.optimizer.diagnose_next_step()
        with counted_bytes() as sent:
            shards.optimizer.step()
    return shards.optimizer.take_diagnostics(), Sent(sent.bytes, sent.calls)


def dense(shapes: tuple[Shape, ...], config: DionConfig) -> dict[str, DenseDiagnostics]:
    """The same step of whole matrices."""
    matrices = {
        name: ReferenceMatrix.start(name, weight, config)
        for shape in shapes
        for name, weight in shape.matrices(values(shapes, 0)[shape.name]).items()
    }
    found: dict[str, DenseDiagnostics] = {}
    for step in range(1, STEPS + 1):
        wholes = values(shapes, step)
        for shape in shapes:
            for name, gradient in shape.matrices(wholes[shape.name]).items():
                found[name] = step_and_measure(matrices[name], gradient, LR, WEIGHT_DECAY, config)
    return found


def check(world: World, shapes: tuple[Shape, ...], config: DionConfig, tolerance: float) -> None:
    """Every matrix is measured by one rank of each replica, and is as the dense one."""
    expected = dense(shapes, config)
    results = gloo_world(world.size, diagnose, world, shapes, config)
    measured = [matrix for matrices, _ in results for matrix in matrices]
    assert Counter(m.name for m in measured) == dict.fromkeys(expected, world.replicas)
    for matrix in measured:
        expected[matrix.name].check(matrix, tolerance)
        assert matrix.orthonormality_error < (1e-5 if config.comm_dtype == "fp32" else 0.05)


@pytest.mark.parametrize("world", WORLDS, ids=name_of)
@pytest.mark.parametrize("shapes", [TRANSFORMER, ODD], ids=["transformer", "odd"])
@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
def test_every_grid_measures_the_dense_figures(
    world: World, shapes: tuple[Shape, ...], right_factor: str
) -> None:
    check(world, shapes, DionConfig(rank_fraction=0.3, right_factor=right_factor, seed=7), 1e-3)


def test_states_in_bf16() -> None:
    dtypes = dict.fromkeys(("momentum_dtype", "factor_dtype", "comm_dtype"), "bf16")
    check(World(2, 2), TRANSFORMER, DionConfig(rank_fraction=0.3, seed=7, **dtypes), 0.03)


def test_two_exchanges_of_a_set_however_many_matrices() -> None:
    """Two sets, each one all_to_all over tensor-parallel and one over data-parallel ranks.

    Of TRANSFORMER alone, one of the sets has no matrix that is cut between data-parallel ranks.
    """
    for shapes, extra in (
        (TRANSFORMER, 3),
        (TRANSFORMER + tuple(Shape(f"more.{i}", 24, 36, 0) for i in range(6)), 4),
    ):
        config = DionConfig(rank_fraction=0.3, seed=7)
        calls = {
            watch: [
                sent.calls
                for _, sent in gloo_world(4, diagnose, World(2, 2), shapes, config, watch)
            ]
            for watch in (False, True)
        }
        assert [on - off for on, off in zip(calls[True], calls[False], strict=True)] == [extra] * 4


MODEL4 = [*MODEL, *"--seq-length 16 --max-position-embeddings 16 --num-layers 4".split()]
# Every expert sees every token: a choice between experts would turn rounding into other routes.
EXPERTS = (
    "--num-layers 2 --num-experts 4 --moe-router-topk 4 --moe-router-load-balancing-type none"
    " --moe-token-dispatcher-type alltoall --moe-ffn-hidden-size 40"
).split()
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
TOPOLOGIES = {
    "dp2": (2, 3, ""),
    "tp2": (2, 6, TP2),
    "tp2-dp2": (4, 6, TP2),
    "pp2-vpp2": (2, 6, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "instances": (2, 6, "--num-distributed-optimizer-instances 2"),
    "compressed": (2, 6, "--num-distributed-optimizer-instances 2 --dion-compressed-sync"),
}


def train_measured(
    nursery: Nursery, folder: Path, model: list[str], ranks: int, micro: int, flags: str
) -> dict[str, MatrixDiagnostics]:
    """Trains four iterations from a checkpoint; what was measured in the last, by name."""
    nursery.run(
        ranks,
        train,
        [
            *(*model, *TRAINING, *DION, "--micro-batch-size", str(micro), *flags.split()),
            *("--finetune", "--load", str(folder.parent / "start"), "--run-dir", str(folder)),
            *"--clip-grad 0 --train-iters 4 --dion-log-interval 2 --switch-optimizer".split(),
        ],
    )
    records = read_metrics(folder / "metrics.jsonl")
    snapshots = read_diagnostics(records)
    assert [snapshot.iteration for snapshot in snapshots] == [2, 4]
    assert [record["iteration"] for record in records] == [1, 2, 2, 3, 4, 4]
    with (folder / "routing.tsv").open() as file:
        routed = {row["matrix"] for row in csv.DictReader(file, delimiter="\t")} - {""}
    found = {matrix.name: matrix for matrix in snapshots[-1].matrices}
    assert found.keys() == routed
    return found


def assert_equal(found: dict[str, MatrixDiagnostics], alone: dict[str, MatrixDiagnostics]) -> None:
    assert found.keys() == alone.keys()
    for name, matrix in found.items():
        for figure in set(FIGURES) - {"owner_seconds", "orthonormality_error"}:
            expected = pytest.approx(getattr(alone[name], figure), rel=2e-3)
            assert getattr(matrix, figure) == expected, (name, figure)
        assert matrix.orthonormality_error < 1e-4
        assert matrix.owner_seconds > 0


@pytest.fixture(scope="module")
def start(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnostics")
    save_start(nursery, MODEL4, folder / "start")
    return folder


@pytest.fixture(scope="module")
def alone(nursery: Nursery, start: Path) -> dict[str, MatrixDiagnostics]:
    return train_measured(nursery, start / "alone", MODEL4, 1, 6, "")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_topologies_measure_what_one_process_does(
    nursery: Nursery, start: Path, alone: dict[str, MatrixDiagnostics], topology: str
) -> None:
    assert_equal(train_measured(nursery, start / topology, MODEL4, *TOPOLOGIES[topology]), alone)


def test_experts_on_several_ranks(nursery: Nursery, tmp_path: Path) -> None:
    model = [*MODEL4, *EXPERTS]
    save_start(nursery, model, tmp_path / "start")
    alone = train_measured(nursery, tmp_path / "alone", model, 1, 6, "")
    spread = train_measured(
        nursery, tmp_path / "ep2", model, 2, 6, "--expert-model-parallel-size 2"
    )
    assert sum(".experts." in name for name in alone) == 2 * 4 * 3
    assert_equal(spread, alone)


def test_a_skipped_step_measures_nothing(nursery: Nursery, tmp_path: Path) -> None:
    flags = "--train-iters 8 --num-layers 2 --fp16 --initial-loss-scale 4194304"
    log = ["--dion-log-interval", "1", "--run-dir", str(tmp_path)]
    nursery.pretrain(1, *DION, *flags.split(), "--hysteresis", "1", *log)
    records = read_metrics(tmp_path / "metrics.jsonl")
    skipped = {r["iteration"] for r in records if r["kind"] == "train" and r["skipped"]}
    assert 0 < len(skipped) < 8
    assert [s.iteration for s in read_diagnostics(records)] == sorted(set(range(1, 9)) - skipped)


def test_tensorboard_has_the_kinds_of_matrices(nursery: Nursery, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--train-iters 4 --num-layers 2 --dion-log-interval 2 --tensorboard-dir"
    nursery.pretrain(1, *DION, *flags.split(), str(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("dion-")]
    kind = "decoder.layers.*.self_attention.linear_qkv.weight[query]"
    assert f"dion-captured/{kind}/median" in tags
    # query, key, value, projection, gate, up, down
    assert len(tags) == 7 * len(FIGURES) * 3
    assert [event.step for event in events.Scalars(tags[0])] == [2, 4]


class FakeWandb:
    """In place of the module that Megatron's writer is."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, list[str]]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, sorted(values)))


def train_with_wandb(argv: list[str]) -> list[tuple[int, list[str]]]:
    """On a rank: what W&B was told of Dion."""
    from megatron_dion.megatron import diagnostics

    wandb = FakeWandb()
    diagnostics.get_wandb_writer = lambda: wandb
    train([*MODEL, *TRAINING, *DION, *argv])
    return wandb.logged


def test_wandb_hears_of_the_same(nursery: Nursery, tmp_path: Path) -> None:
    flags = ["--train-iters", "3", "--dion-log-interval", "3", "--run-dir", str(tmp_path)]
    [[(step, tags)]] = nursery.run(1, train_with_wandb, flags)
    assert step == 3
    assert len(tags) == 7 * len(FIGURES) * 3


def calls_of_iterations(argv: list[str]) -> list[Counter[str]]:
    """On a rank: the collectives of each iteration from the second on, measuring included."""
    import torch.distributed as dist
    from megatron.training import training

    calls: Counter[str] = Counter()
    for name in (*COLLECTIVES, "gather_object"):
        setattr(dist, name, counting(name, getattr(dist, name), calls))
    seen: list[Counter[str]] = []
    log = training.training_log

    @functools.wraps(log)  # what is patched must look as it did
    def logged(*args: Any, **options: Any) -> Any:
        seen.append(Counter(calls))
        calls.clear()
        return log(*args, **options)

    training.training_log = logged
    train([*MODEL, *TRAINING, *DION, *TP2.split(), "--train-iters", "4", *argv])
    return seen[1:]


def test_only_measured_iterations_cost_collectives(nursery: Nursery, tmp_path: Path) -> None:
    flags = ["--dion-log-interval", "2", "--run-dir", str(tmp_path)]
    off, on = (nursery.run(4, calls_of_iterations, argv) for argv in ([], flags))
    # Two sets, each one exchange over tensor-parallel ranks: no matrix is cut between others.
    extra = {"all_to_all_single": 2, "gather_object": 1}
    for never, measured in zip(off, on, strict=True):
        second, third, fourth = never
        assert measured == [second + Counter(extra), third, fourth + Counter(extra)]
