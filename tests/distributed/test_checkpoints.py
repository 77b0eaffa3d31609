"""A run that stops and goes on is the same run, on the same topology and on any other."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_dion.checkpointing.contents import Contents
from megatron_dion.checkpointing.folders import folder_of
from tests.distributed.tiny_gpt import (
    DION,
    INSTANCES,
    MODEL,
    OVERLAP,
    PP2,
    TP2,
    TRAINING,
    losses,
    save_in_background,
)
from tests.worlds import train, world

# Every expert sees every token: a choice between experts would turn rounding into other routes.
EXPERTS = (
    "--num-layers 4 --num-experts 4 --moe-router-topk 4 --moe-router-load-balancing-type none"
    " --moe-token-dispatcher-type alltoall --moe-ffn-hidden-size 24 --clip-grad 0"
).split()
# Compressed instances take the paper's update: all grids do.
COMMON = [
    *MODEL, *TRAINING, *DION,
    *"--seq-length 16 --max-position-embeddings 16 --dion-residual none".split(),
]  # fmt: skip

EP2 = "--expert-model-parallel-size 2"
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
HALF, END = 2, 4
SLOW = pytest.mark.slow


def run(topology: str, folder: Path, *flags: str) -> None:
    """Trains to the last iteration and saves it in a folder."""
    ranks, micro, grid = GRIDS[topology]
    size = ["--micro-batch-size", str(micro), "--train-iters", str(END)]
    save = ["--save", str(folder), "--save-interval", str(END), "--run-dir", str(folder / "run")]
    world(ranks).train(*COMMON, *grid.split(), *size, *save, *flags)


def load(folder: Path) -> list[str]:
    return ["--load", str(folder), "--ckpt-step", str(HALF)]


def tensors(folder: Path, iteration: int = END) -> dict[str, Tensor]:
    """All tensors of a checkpoint: the model's and the optimizer's."""
    contents = Contents(folder_of(folder, iteration))
    return contents.read(*(key for key in contents.tensors if "rng_state" not in key))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    run("single", folder, *EXPERTS, "--save-interval", str(HALF))
    return folder


@pytest.mark.parametrize(
    "topology",
    [
        *("dp3", "tp2-dp2", "pp2-vpp2", "ep2-tp2-etp1", "compressed"),
        *(pytest.param(name, marks=SLOW) for name in ("tp2-pp2", "ep2-pp2", "cp2", "instances")),
    ],
)
def test_any_topology_goes_on_and_saves_the_same(
    single: Path, tmp_path: Path, topology: str
) -> None:
    """Two iterations on: every tensor of model and optimizer as the run in one process has it."""
    run(topology, tmp_path, *EXPERTS, *load(single))
    expected, found = tensors(single), tensors(tmp_path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        error = (found[key].double() - tensor.double()).norm() / tensor.double().norm()
        assert error < 1e-4, (key, float(error))
    assert losses(tmp_path / "run") == pytest.approx(losses(single / "run")[HALF:], abs=2e-5)


@pytest.mark.parametrize(
    ("topology", "flags"),
    [
        (
            "dp3",
            "--bf16 --dion-momentum-dtype bf16 --dion-factor-dtype bf16 --dion-comm-dtype bf16",
        ),
        ("tp2-pp2", "--fp16 --initial-loss-scale 4096 --num-layers 4"),
        ("compressed", ""),
        pytest.param("tp2-dp2", "--bf16 --hidden-dropout 0.1", marks=SLOW),
        pytest.param("dp3", "--dion-scalar-optimizer lion --dion-scalar-lr-mult 0.1", marks=SLOW),
        pytest.param("instances", "--ckpt-fully-parallel-load", marks=SLOW),
        pytest.param("tp2-dp2", "--ckpt-assume-constant-structure", marks=SLOW),
    ],
)
def test_resume_on_the_same_topology_is_exact(tmp_path: Path, topology: str, flags: str) -> None:
    """Bit for bit the run that was not stopped: clipped, so that gradient norms count too."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argv = ["--num-layers", "2", *flags.split()]
    run(topology, whole, *argv, "--save-interval", str(HALF))
    run(topology, resumed, *argv, *load(whole))
    assert losses(resumed / "run") == losses(whole / "run")[HALF:]
    assert_equal(tensors(resumed), tensors(whole))


def train_saving_in_background(argv: Sequence[str]) -> None:
    """On a rank."""
    save_in_background()
    train([*argv, "--async-save"])


def test_saves_in_the_background_are_of_their_iterations(tmp_path: Path) -> None:
    """One after each step: those of the run that waits for each, and no two the same."""
    argv = [*COMMON, "--num-layers", "2", "--train-iters", str(END), "--save-interval", "1"]
    folders = tmp_path / "one", tmp_path / "other"
    world(1).fork(train_saving_in_background, [*argv, "--save", str(folders[0])])
    world(1).train(*argv, "--save", str(folders[1]))
    before: dict[str, Tensor] = {}
    for iteration in range(1, END + 1):
        found, expected = (tensors(folder, iteration) for folder in folders)
        assert_equal(found, expected)
        # But for weights at the start of the warm-up, all has changed.
        assert not [key for key in before if torch.equal(found[key], before[key])]
        before = found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("topology", ["tp2-dp2", pytest.param("dp3", marks=SLOW)])
def test_saving_changes_nothing(tmp_path: Path, topology: str) -> None:
    """Two deterministic runs are equal, also where one has saved on its way."""
    argv = ["--num-layers", "2", "--bf16", "--deterministic-mode"]
    run(topology, tmp_path / "one", *argv, "--save-interval", str(HALF))
    run(topology, tmp_path / "other", *argv)
    assert_equal(tensors(tmp_path / "one"), tensors(tmp_path / "other"))
