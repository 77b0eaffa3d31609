"""Diagnostics of runs: the same on every grid, and where TensorBoard and W&B look for them."""

import csv
from pathlib import Path

import pytest

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion.optimizer.diagnostics import FIGURES, MatrixDiagnostics, read_diagnostics
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, train
from tests.distributed.recording import save_start
from tests.worlds import world

MODEL4 = [*MODEL, *"--seq-length 16 --max-position-embeddings 16 --num-layers 4".split()]
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
TOPOLOGIES = {
    "tp2-dp2": (4, 6, TP2),
    "pp2-vpp2": (2, 6, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "instances": (2, 6, "--num-distributed-optimizer-instances 2"),
}


def train_measured(
    folder: Path, ranks: int, micro: int, flags: str
) -> dict[str, MatrixDiagnostics]:
    """Trains four iterations from a checkpoint; what was measured in the last, by name."""
    world(ranks).fork(
        train,
        [
            *(*MODEL4, *TRAINING, *DION, "--micro-batch-size", str(micro), *flags.split()),
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
        for figure in FIGURES:
            expected = pytest.approx(getattr(alone[name], figure), rel=2e-3)
            assert getattr(matrix, figure) == expected, (name, figure)


@pytest.fixture(scope="module")
def start(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnostics")
    save_start(nursery, MODEL4, folder / "start")
    return folder


@pytest.fixture(scope="module")
def alone(start: Path) -> dict[str, MatrixDiagnostics]:
    return train_measured(start / "alone", 1, 6, "")


@pytest.mark.parametrize(
    "topology",
    ["tp2-dp2", *(pytest.param(t, marks=pytest.mark.slow) for t in TOPOLOGIES if t != "tp2-dp2")],
)
def test_topologies_measure_what_one_process_does(
    start: Path, alone: dict[str, MatrixDiagnostics], topology: str
) -> None:
    assert_equal(train_measured(start / topology, *TOPOLOGIES[topology]), alone)


def test_a_skipped_step_measures_nothing(tmp_path: Path) -> None:
    flags = "--train-iters 8 --num-layers 2 --fp16 --initial-loss-scale 4194304"
    log = ["--dion-log-interval", "1", "--run-dir", str(tmp_path)]
    world(1).train(*MODEL, *TRAINING, *DION, *flags.split(), "--hysteresis", "1", *log)
    records = read_metrics(tmp_path / "metrics.jsonl")
    skipped = {r["iteration"] for r in records if r["kind"] == "train" and r["skipped"]}
    assert 0 < len(skipped) < 8
    assert [s.iteration for s in read_diagnostics(records)] == sorted(set(range(1, 9)) - skipped)


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


def test_tensorboard_and_wandb_have_the_kinds_of_matrices(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--train-iters 4 --num-layers 2 --dion-log-interval 2 --tensorboard-dir"
    [logged] = world(1).fork(train_with_wandb, [*flags.split(), str(tmp_path)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = sorted(tag for tag in events.Tags()["scalars"] if tag.startswith("dion-"))
    kind = "decoder.layers.*.self_attention.linear_qkv.weight[query]"
    assert f"dion-captured/{kind}/median" in tags
    # query, key, value, projection, gate, up, down
    assert len(tags) == 7 * len(FIGURES) * 3
    assert [event.step for event in events.Scalars(tags[0])] == [2, 4]
    assert logged == [(2, tags), (4, tags)]
