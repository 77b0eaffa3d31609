"""A run that stops and goes on is the same run, on the same topology and on another."""

from pathlib import Path

import pytest

from tests.distributed.nursery import DION, Nursery, losses, read_metrics

SAVE = "--ckpt-format torch_dist --save-interval 4 --dist-ckpt-optim-fully-reshardable".split()
GRIDS = {
    "single": (1, []),
    "tp2-dp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel".split()),
    "dp3": (3, "--micro-batch-size 4".split()),
}


def pretrain(nursery: Nursery, grid: str, *argv: str) -> None:
    size, flags = GRIDS[grid]
    nursery.pretrain(size, *DION, "--num-layers", "2", *flags, *argv)


@pytest.fixture(scope="module")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight iterations in one go, with a checkpoint after four."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(
        nursery, "tp2-dp2", "--train-iters", "8", "--run-dir", str(folder / "run"),
        "--save", str(folder / "checkpoints"), *SAVE,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(("grid", "tolerance"), [("tp2-dp2", 0.0), ("single", 2e-5), ("dp3", 2e-5)])
def test_resumed_run_is_the_same_run(
    nursery: Nursery, whole: Path, tmp_path: Path, grid: str, tolerance: float
) -> None:
    pretrain(
        nursery, grid, "--train-iters", "8", "--run-dir", str(tmp_path / "run"),
        "--load", str(whole / "checkpoints"), "--ckpt-step", "4",
        "--dist-ckpt-optim-fully-reshardable",
    )  # fmt: skip
    resumed = read_metrics(tmp_path / "run")
    assert [entry["iteration"] for entry in resumed] == [5, 6, 7, 8]
    expected = losses(whole / "run")[4:]
    assert max(abs(r["lm_loss"] - e) for r, e in zip(resumed, expected, strict=True)) <= tolerance


def test_lion_beside_dion_resumes_exactly(nursery: Nursery, tmp_path: Path) -> None:
    lion = ["--dion-scalar-optimizer", "lion", "--dion-scalar-lr-mult", "0.1", *SAVE]
    checkpoints = str(tmp_path / "checkpoints")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    saving = ("--save", checkpoints, "--run-dir", str(whole))
    pretrain(nursery, "dp3", "--train-iters", "8", *lion, *saving)
    loading = ("--load", checkpoints, "--ckpt-step", "4", "--run-dir", str(resumed))
    pretrain(nursery, "dp3", "--train-iters", "8", *lion, *loading)
    assert losses(resumed) == losses(whole)[4:]
