"""A run that stops and goes on is the same run, on the same topology and on any other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dion import Dion
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses, read_metrics, train
from tests.distributed.recording import save_start

SMALL = "--seq-length 16 --max-position-embeddings 16 --train-iters 8 --clip-grad 0".split()
# Every expert sees every token: a choice between experts would turn rounding into other routes.
EXPERTS = (
    "--num-layers 4 --num-experts 4 --moe-router-topk 4 --moe-router-load-balancing-type none"
    " --moe-token-dispatcher-type alltoall --moe-ffn-hidden-size 24"
).split()
DENSE = ["--num-layers", "2"]

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000"
INSTANCES = "--num-distributed-optimizer-instances 2"
# Ranks, samples of a rank at a time, flags.
GRIDS: dict[str, tuple[int, int, str]] = {
    "single": (1, 12, ""),
    "dp3": (3, 4, OVERLAP),
    "tp2-dp2": (4, 6, f"{TP2} {OVERLAP}"),
    "pp2-vpp2": (2, 6, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "tp2-pp2": (4, 6, f"{TP2} {PP2}"),
    "ep2-tp2-etp1": (4, 6, f"{TP2} {EP2} --expert-tensor-parallel-size 1"),
    "ep2-pp2": (4, 6, f"{EP2} {PP2}"),
    "cp2": (2, 12, "--context-parallel-size 2"),
    "instances": (4, 3, INSTANCES),
    "compressed": (4, 3, f"{INSTANCES} --dion-compressed-sync {OVERLAP}"),
}
HALF = 4
PAIRED = [name for name in GRIDS if name != "tp2-pp2"]


def argv_of(topology: str, *flags: str) -> tuple[int, list[str]]:
    """Number of ranks, and the command line on a topology."""
    ranks, micro, grid = GRIDS[topology]
    shape = [*grid.split(), "--micro-batch-size", str(micro)]
    return ranks, [*MODEL, *TRAINING, *DION, *SMALL, *shape, *flags]


def run(nursery: Nursery, topology: str, *flags: str) -> None:
    ranks, argv = argv_of(topology, *flags)
    nursery.run(ranks, train, argv)


class Saved:
    """Runs of eight iterations that save in the middle, all from one start."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self._nursery = nursery
        self._folder = folder
        save_start(nursery, [*MODEL, *EXPERTS, *SMALL[:4]], folder / "start")

    def by(self, topology: str) -> Path:
        """The folder of a run's checkpoints, with its losses beside them."""
        folder = self._folder / topology
        if not folder.exists():
            run(
                self._nursery, topology, *EXPERTS, "--load", str(self._folder / "start"),
                "--finetune", "--run-dir", str(folder / "run"), "--save", str(folder),
                "--save-interval", str(HALF),
            )  # fmt: skip
        return folder

    def losses(self) -> list[float]:
        """Of the undisturbed run in one process."""
        return losses(self.by("single") / "run")


@pytest.fixture(scope="module")
def saved(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(nursery, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("writer", PAIRED)
def test_any_topology_loads_any_other(
    nursery: Nursery, saved: Saved, tmp_path: Path, writer: str
) -> None:
    folder = saved.by(writer)
    expected = saved.losses()[HALF:]
    assert largest_difference(losses(folder / "run"), saved.losses()) < 2e-5
    for reader in PAIRED:
        run_dir = tmp_path / reader
        load = ["--load", str(folder), "--ckpt-step", str(HALF), "--run-dir", str(run_dir)]
        run(nursery, reader, *EXPERTS, *load)
        found = losses(run_dir)
        assert largest_difference(found, expected) < 2e-5, reader
        if reader == writer:
            assert found == losses(folder / "run")[HALF:], reader


def largest_difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def train_and_keep_weights(argv: Sequence[str]) -> list[torch.Tensor]:
    """On a rank: trains; returns master weights, momenta and right factors after the last step."""
    step = Dion.step
    kept: dict[int, list[torch.Tensor]] = {}

    def watched(self: Dion, closure: None = None) -> None:
        step(self, closure)
        blocks = [block.tensors for block in self.held_blocks()]
        kept[id(self)] = [
            tensor.clone() for b in blocks for tensor in (b.weight, b.momentum, b.kept_right)
        ]

    Dion.step = watched
    train(argv)
    return [tensor for tensors in kept.values() for tensor in tensors]


EXACT = {
    "fp32": ("tp2-dp2", ""),
    "bf16": ("tp2-dp2", "--bf16"),
    "bf16-states": (
        "dp3",
        "--bf16 --dion-momentum-dtype bf16 --dion-factor-dtype bf16 --dion-comm-dtype bf16",
    ),
    "fp16": ("tp2-pp2", "--fp16 --initial-loss-scale 4096"),
    "dropout": ("tp2-dp2", "--attention-dropout 0.1 --hidden-dropout 0.1"),
    "lion": ("dp3", "--dion-scalar-optimizer lion --dion-scalar-lr-mult 0.1"),
    "orth": ("tp2-dp2", "--dion-right-factor orth"),
    "compressed": ("compressed", ""),
    "async": ("tp2-dp2", "--async-save"),
    "parallel-load": ("instances", "--ckpt-fully-parallel-load"),
    "constant-structure": ("tp2-dp2", "--ckpt-assume-constant-structure --save-interval 2"),
}


@pytest.mark.parametrize("case", EXACT)
def test_resume_on_the_same_topology_is_exact(nursery: Nursery, tmp_path: Path, case: str) -> None:
    topology, flags = EXACT[case]
    layers = ["--num-layers", "4"] if "pp2" in topology else DENSE
    ranks, argv = argv_of(topology, *layers, "--save-interval", str(HALF), *flags.split())
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    save = ["--save", str(tmp_path), "--run-dir", str(whole)]
    expected = nursery.run(ranks, train_and_keep_weights, [*argv, *save])
    load = ["--load", str(tmp_path), "--ckpt-step", str(HALF), "--run-dir", str(resumed)]
    found = nursery.run(ranks, train_and_keep_weights, [*argv, *load])
    assert [entry["iteration"] for entry in read_metrics(resumed)] == [5, 6, 7, 8]
    assert losses(resumed) == losses(whole)[HALF:]
    assert grad_norms(resumed) == grad_norms(whole)[HALF:]
    for one, other in zip(found, expected, strict=True):
        assert one
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def grad_norms(run_dir: Path) -> list[float]:
    return [entry["grad_norm"] for entry in read_metrics(run_dir)]


def test_saving_changes_nothing(nursery: Nursery, tmp_path: Path) -> None:
    """A run that saves is the run that does not; only compressed sync averages momenta to save."""
    run(nursery, "tp2-dp2", *DENSE, "--run-dir", str(tmp_path / "plain"))
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "3"]
    run(nursery, "tp2-dp2", *DENSE, *save, "--run-dir", str(tmp_path / "saving"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "saving")


@pytest.mark.parametrize("topology", ["tp2-dp2", "compressed"])
def test_two_deterministic_runs_are_equal(nursery: Nursery, tmp_path: Path, topology: str) -> None:
    ranks, argv = argv_of(topology, *DENSE, "--deterministic-mode", "--bf16")
    one, other = (
        nursery.run(ranks, train_and_keep_weights, [*argv, "--run-dir", str(tmp_path / name)])
        for name in ("one", "other")
    )
    assert losses(tmp_path / "one") == losses(tmp_path / "other")
    for here, there in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


MOVING = (
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "gather",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


def count_calls_of_save(argv: Sequence[str]) -> dict[str, int]:
    """On a rank: the collectives that move tensors while a checkpoint is saved."""
    import torch.distributed as dist
    from megatron.training import training

    saving = False
    calls: dict[str, int] = {}
    save = training.save_checkpoint

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            if saving:
                calls[name] = calls.get(name, 0) + 1
            return function(*args, **options)

        return counted

    def watched(*args: Any, **options: Any) -> None:
        nonlocal saving
        saving = True
        save(*args, **options)
        saving = False

    for name in MOVING:
        setattr(dist, name, counting(name, getattr(dist, name)))
    training.save_checkpoint = watched
    train(argv)
    return calls


@pytest.mark.parametrize("topology", ["tp2-dp2", "tp2-pp2"])
def test_saving_moves_no_tensors(nursery: Nursery, tmp_path: Path, topology: str) -> None:
    """Each rank writes its rows; what is gathered are descriptions, as objects."""
    save = ["--save", str(tmp_path), "--save-interval", "8"]
    ranks, argv = argv_of(topology, *DENSE, *save)
    for calls in nursery.run(ranks, count_calls_of_save, argv):
        # Whether any rank failed: one number, when all have written (state_dict_saver.py:242).
        assert calls in ({}, {"broadcast": 1})
