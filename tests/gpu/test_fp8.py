"""Training in FP8 by Transformer Engine, with its own layers and kernels, over NCCL.

The weights on every GPU are compared with those of whole weights, as on CPU.
"""

import itertools
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.distributed.test_fp8 import MODEL as MODEL_ON_CPU
from tests.distributed.tiny_gpt import DION, TRAINING, losses
from tests.fp8_emulation.checks import RECIPES, RankWeight, check_forms, masters_of
from tests.gpu.run import on_ranks

MISSING = [name for name in ("megatron", "transformer_engine") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: make test-gpu where there is"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
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
    """Trains in a world of GPUs; what each kept. Its metrics are in the folder."""
    gpus, grid_flags = GRIDS[grid]
    needs(recipe)
    argv = [*MODEL, *RECIPES.get(recipe, "").split(), *grid_flags.split()]
    argv += ["--run-dir", str(folder), "--train-iters", str(ITERATIONS), *flags]
    recorded: list[list[list[RankWeight]]] = on_ranks(gpus, "train_fp8", folder, *argv)
    return recorded


def needs(recipe: str) -> None:
    """Skips what these GPUs cannot do."""
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
