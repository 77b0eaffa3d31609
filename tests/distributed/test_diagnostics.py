"""Diagnostics of runs: the same on every grid, and where TensorBoard and W&B look for them."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion.optimizer.diagnostics import FIGURES, MatrixDiagnostics, read_diagnostics
from tests.distributed.recording import save_start
from tests.distributed.tiny_gpt import DION, MODEL, PP2, TP2, TRAINING, pretrain
from tests.worlds import train, world

MODEL4 = [*MODEL, *"--seq-length 16 --max-position-embeddings 16 --num-layers 4".split()]
TOPOLOGIES = {
    "tp2-dp2": (4, 6, TP2),
    "pp2-vpp2": (2, 6, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "instances": (2, 6, "--num-distributed-optimizer-instances 2"),
}


def train_measured(
    folder: Path, ranks: int, micro: int, flags: str
) -> dict[str, MatrixDiagnostics]:
    """Trains four iterations from a checkpoint; what was measured in the last, by name."""
    argv = [*MODEL4, *TRAINING, *DION, *flags.split(), "--micro-batch-size", str(micro)]
    argv += "--clip-grad 0 --train-iters 4 --dion-log-interval 2 --switch-optimizer".split()
    argv += ["--finetune", "--load", str(folder.parent / "start"), "--run-dir", str(folder)]
    world(ranks).train(*argv)
    records = read_metrics(folder / "metrics.jsonl")
    snapshots = read_diagnostics(records)
    assert [snapshot.iteration for snapshot in snapshots] == [2, 4]
    assert [record["iteration"] for record in records] == [1, 2, 2, 3, 4, 4]
    with (folder / "routing.tsv").open() as file:
        routed = {row["matrix"] for row in csv.DictReader(file, delimiter="\t")} - {""}
    found = {matrix.name: matrix for matrix in snapshots[-1].matrices}
    assert found.keys() == routed
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of the runs, and what one process measures."""
    folder = tmp_path_factory.mktemp("diagnostics")
    save_start(MODEL4, folder / "start")
    return folder, train_measured(folder / "alone", 1, 6, "")


@pytest.mark.parametrize(
    "topology",
    ["tp2-dp2", *(pytest.param(t, marks=pytest.mark.slow) for t in TOPOLOGIES if t != "tp2-dp2")],
)
def test_topologies_measure_what_one_process_does(alone: Any, topology: str) -> None:
    folder, expected = alone
    found = train_measured(folder / topology, *TOPOLOGIES[topology])
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        for figure in FIGURES:
            one = pytest.approx(getattr(expected[name], figure), rel=2e-3)
            assert getattr(matrix, figure) == one, (name, figure)


def test_a_skipped_step_measures_nothing(tmp_path: Path) -> None:
    flags = "--train-iters 8 --num-layers 2 --fp16 --initial-loss-scale 4194304"
    log = ["--dion-log-interval", "1", "--run-dir", str(tmp_path)]
    pretrain(1, *DION, *flags.split(), "--hysteresis", "1", *log)
    records = read_metrics(tmp_path / "metrics.jsonl")
    skipped = {r["iteration"] for r in records if r["kind"] == "train" and r["skipped"]}
    assert 0 < len(skipped) < 8
    assert [s.iteration for s in read_diagnostics(records)] == sorted(set(range(1, 9)) - skipped)


def train_with_wandb(argv: list[str]) -> list[tuple[int, dict[str, float]]]:
    """On a rank: trains; iterations and series of which W&B was told."""
    from megatron_dion.megatron import recorder

    told: list[tuple[int, dict[str, float]]] = []
    wandb = SimpleNamespace(log=lambda values, step: told.append((step, values)))
    recorder.get_wandb_writer = lambda: wandb
    train([*MODEL, *TRAINING, *DION, *argv])
    return told


def test_tensorboard_and_wandb_have_the_series_of_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, log = tmp_path / "run", "--tensorboard-log-interval 2 --eval-interval 4 --eval-iters 1"
    flags = f"--train-iters 4 --num-layers 2 --dion-log-interval 2 --tensorboard-dir {tmp_path}"
    [told] = world(1).fork(train_with_wandb, f"{flags} {log} --run-dir {folder}".split())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    in_wandb = {(step, tag): value for step, values in told for tag, value in values.items()}
    ours = [tag for tag in events.Tags()["scalars"] if "/" in tag]
    written = {(e.step, tag): e.value for tag in ours for e in events.Scalars(tag)}
    assert written.keys() ^ in_wandb.keys() == set()
    assert written == pytest.approx(in_wandb)

    diagnosed = {tag: value for tag, value in written.items() if tag[1].startswith("dion-")}
    # query, key, value, projection, gate, up, down
    assert len(diagnosed) == 2 * 7 * len(FIGURES) * 3
    kind = "decoder.layers.*.self_attention.linear_qkv.weight[query]"
    assert (2, f"dion-captured/{kind}/median") in diagnosed
    expected = {
        (record["iteration"], f"{record['kind']}/{name}"): float(value)
        for record in read_metrics(folder / "metrics.jsonl")
        for name, value in record.items()
        if name not in ("kind", "iteration", "fields", "matrices") and record["iteration"] % 2 == 0
    }
    assert {(4, "train/optimizer_seconds"), (4, "validation/lm_loss")} <= expected.keys()
    assert written == pytest.approx(diagnosed | expected)
