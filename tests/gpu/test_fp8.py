"""Training in FP8 by Transformer Engine, with its own layers and kernels, over NCCL.

The weights on every GPU are compared with those of whole weights, as on CPU. Without a GPU the
tests are skipped, but not by `make test-gpu`, which sets REQUIRE_GPU_TESTS.
"""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.distributed.test_fp8 import MODEL as MODEL_ON_CPU
from tests.distributed.tiny_gpt import DION, TRAINING, losses
from tests.fp8_emulation.checks import RECIPES, RankWeight, check_forms, masters_of

HAS_ALL = torch.cuda.is_available() and find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_ALL and "REQUIRE_GPU_TESTS" not in os.environ,
        reason="no CUDA device with Transformer Engine: make test-gpu where there is",
    ),
]
ITERATIONS = 8
HALF = ITERATIONS // 2
# Of the model of the CPU tests, with what kernels on GPUs want.
MODEL = (
    *(*MODEL_ON_CPU, *TRAINING, *DION),
    *"--hidden-size 320 --kv-channels 64 --seq-length 128 --max-position-embeddings 128".split(),
    *"--init-method-std 0.02 --micro-batch-size 4 --global-batch-size 16 --log-interval 1".split(),
    *"--transformer-impl transformer_engine --no-gradient-accumulation-fusion".split(),
    *"--no-bias-swiglu-fusion --device cuda".split(),
)
GRIDS = {
    "one GPU": (1, ""),
    "DP2": (2, "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 300000"),
    "TP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
}


def run(folder: Path, recipe: str, grid: str, *flags: str) -> list[list[list[RankWeight]]]:
    """Trains in a world of GPUs; what each kept. Its metrics and log are in the folder."""
    gpus, grid_flags = GRIDS[grid]
    needs(recipe, gpus)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(gpus), "-m", "tests.gpu.run", str(folder), *MODEL]
    command += [*RECIPES.get(recipe, "").split(), *grid_flags.split(), "--run-dir", str(folder)]
    command += ["--train-iters", str(ITERATIONS), *flags]
    # Without the one Transformer Engine does not load the scales of delayed scaling; the other is
    # Megatron's condition for tensor parallelism before Blackwell.
    environment = {**os.environ, "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1"}
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with (folder / "log.txt").open("w") as log:
        answer = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    status = answer.returncode
    assert status == 0, (folder / "log.txt").read_text()[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(gpus)]


def needs(recipe: str, gpus: int) -> None:
    """Skips what these GPUs cannot do."""
    if gpus > 1 and torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, there is {torch.cuda.device_count()}")
    wanted = {"mxfp8": (10, 0), "blockwise": (9, 0), "bf16": (8, 0)}.get(recipe, (8, 9))
    if torch.cuda.get_device_capability() < wanted:
        pytest.skip(f"{recipe} needs compute capability {wanted[0]}.{wanted[1]}")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_and_scales_are_those_of_whole_weights(
    tmp_path: Path, recipe: str, grid: str
) -> None:
    recorded = run(tmp_path, recipe, grid)
    steps = [[rank[step] for rank in recorded] for step in range(ITERATIONS + 1)]
    for before, after in itertools.pairwise(steps):
        check_forms(recipe, after, masters_of(before))
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.5
    routes = (tmp_path / "routing.tsv").read_text().splitlines()
    assert sum("\tdion\tlinear layer, kept in FP8\t" in route for route in routes) == 3 * 7


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("delayed", "delayed"), ("tensorwise", "tensorwise"), ("bf16", "tensorwise"),
     ("tensorwise", "bf16"), ("blockwise", "blockwise")],
)  # fmt: skip
def test_checkpoints_are_of_no_precision(tmp_path: Path, writer: str, reader: str) -> None:
    flags = ["--save", str(tmp_path / "saved"), "--save-interval", str(HALF)]
    saved = run(tmp_path / "first", writer, "one GPU", *flags)
    flags = ["--load", str(tmp_path / "saved"), "--ckpt-step", str(HALF)]
    loaded = run(tmp_path / "second", reader, "one GPU", *flags)
    masters = masters_of([saved[0][HALF]])
    assert all(torch.equal(masters[key], one) for key, one in masters_of([loaded[0][0]]).items())
    found, expected = losses(tmp_path / "second"), losses(tmp_path / "first")[HALF:]
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert difference == 0 if writer == reader else difference < 0.05
