"""Training with weights kept in FP8: Megatron's own buffers and optimizer, emulated kernels.

The bytes and scales on every rank are compared with those of whole weights. The two recipes take
the two ways that Megatron has; Transformer Engine's own tensors have all in transformer_engine/.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.recording import check_against_reference, train_recorded
from tests.distributed.tiny_gpt import DION, TP2, TRAINING, losses
from tests.distributed.tiny_gpt import MODEL as SMALL_MODEL
from tests.fp8_emulation.checks import (
    RECIPES,
    check_forms,
    masters_of,
    train_in_emulated_fp8,
)
from tests.fp8_emulation.scaling import forms
from tests.fp8_emulation.weights import install
from tests.worlds import RankError, world

ITERATIONS = 4
HALF = ITERATIONS // 2
# Of mxfp8 all sizes must be multiples of 32.
MODEL = [
    *SMALL_MODEL,
    *"--num-layers 3 --hidden-size 160 --ffn-hidden-size 448 --kv-channels 32 --bf16".split(),
    *("--train-iters", str(ITERATIONS)),
]
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size"
VPP2 = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
GRIDS = {
    "dp2": (2, f"{OVERLAP} 80000"),
    "dp4": (4, ""),
    "tp2-dp2": (4, f"{TP2} {OVERLAP} 40000"),
    "vpp2": (2, VPP2),
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def argv_of(recipe: str, *flags: str) -> list[str]:
    return [*MODEL, *TRAINING, *DION, *" ".join((RECIPES.get(recipe, ""), *flags)).split()]


def train_in_fp8(recipe: str, grid: str, *flags: str) -> Any:
    """Trains; what each rank has of each weight, before the first step and after each."""
    ranks, grid_flags = GRIDS[grid]
    return world(ranks).fork(train_in_emulated_fp8, argv_of(recipe, grid_flags, *flags))


def saving(folder: Path) -> str:
    return f"--save {folder} --save-interval {HALF} --run-dir {folder / 'run'}"


def loading(folder: Path) -> str:
    return f"--load {folder} --ckpt-step {HALF} --run-dir {folder / 'again'}"


@pytest.mark.parametrize(
    ("recipe", "grid"),
    [
        ("tensorwise", "tp2-dp2"),
        ("mxfp8", "dp2"),
        slow("tensorwise", "dp4"),
        slow("tensorwise", "vpp2"),
        slow("mxfp8", "tp2-dp2"),
        slow("mxfp8", "vpp2"),
    ],
)
def test_bytes_are_those_of_whole_weights_and_a_resumed_run_is_the_same_run(
    tmp_path: Path, recipe: str, grid: str
) -> None:
    recorded = train_in_fp8(recipe, grid, saving(tmp_path))
    starts = {one.start % one.values.shape[1] for rank in recorded for one in rank[0]}
    assert len(starts) > 1 or grid == "vpp2", "no cut is within a row"
    steps = [[rank[step] for rank in recorded] for step in range(ITERATIONS + 1)]
    assert not torch.equal(steps[0][0][0].values, steps[-1][0][0].values)
    for before, after in itertools.pairwise(steps):
        check_forms(recipe, after, masters_of(before))
    resumed = train_in_fp8(recipe, grid, loading(tmp_path))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")[HALF:]
    for undisturbed_rank, rank in zip(recorded, resumed, strict=True):
        for one, other in zip(undisturbed_rank[-1], rank[-1], strict=True):
            assert torch.equal(one.master, other.master), one.name
            for form, other_form in zip(one.forms, other.forms, strict=True):
                assert all(map(torch.equal, form, other_form)), one.name


def record_in_emulated_fp8(argv: Sequence[str]) -> dict[str, Any]:
    """On a rank: trains, and keeps what Dion was given and what it made of it."""
    install()
    return train_recorded(argv, ITERATIONS)


EXPERTS = (
    "--num-layers 2 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 96"
    " --moe-token-dispatcher-type alltoall"
)


@pytest.mark.parametrize(
    ("recipe", "ranks", "flags", "layers_in_fp8"),
    [
        ("tensorwise", 4, f"{TP2} --first-last-layers-bf16", {1}),
        slow("mxfp8", 2, f"{EXPERTS} --expert-model-parallel-size 2", {0, 1}),
        slow("tensorwise", 2, "--context-parallel-size 2 --micro-batch-size 4", {0, 1, 2}),
    ],
)
def test_dion_updates_fp8_weights_as_the_reference_does(
    tmp_path: Path, recipe: str, ranks: int, flags: str, layers_in_fp8: set[int]
) -> None:
    argv = argv_of(recipe, flags, f"--run-dir {tmp_path}")
    check_against_reference(world(ranks).fork(record_in_emulated_fp8, argv))
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.05, found
    routes = (tmp_path / "routing.tsv").read_text().splitlines()
    in_fp8 = [route for route in routes if "\tdion\tlinear layer, kept in FP8\t" in route]
    assert {int(route.split(".")[2]) for route in in_fp8} == layers_in_fp8


@pytest.mark.slow
def test_compressed_sync_trains_fp8_weights(tmp_path: Path) -> None:
    flags = "--num-distributed-optimizer-instances 2 --dion-compressed-sync --clip-grad 0"
    steps = train_in_fp8("tensorwise", "dp4", flags, f"--run-dir {tmp_path}")
    first, *_, last = losses(tmp_path)
    assert last < first - 0.05
    for one, other in zip(steps[0][-1], steps[2][-1], strict=True):  # of the two instances
        assert torch.equal(one.forms[0][0], other.forms[0][0]), one.name


@pytest.mark.parametrize("recipe", ["tensorwise", slow("mxfp8")])
def test_masters_are_not_rounded_where_no_optimizer_state_is_loaded(
    tmp_path: Path, recipe: str
) -> None:
    saved = train_in_fp8("bf16", "dp2", saving(tmp_path))
    loaded = train_in_fp8(recipe, "dp4", loading(tmp_path), "--finetune")
    whole = masters_of([rank[HALF] for rank in saved])
    for key, master in masters_of([rank[0] for rank in loaded]).items():
        assert torch.equal(master, whole[key].bfloat16().float()), key


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("bf16", "mxfp8"),
        slow("bf16", "tensorwise"),
        slow("mxfp8", "bf16"),
        slow("tensorwise", "mxfp8"),
    ],
)
def test_checkpoints_are_of_no_precision(tmp_path: Path, writer: str, reader: str) -> None:
    saved = train_in_fp8(writer, "dp2", saving(tmp_path))
    loaded = train_in_fp8(reader, "dp4", loading(tmp_path))
    masters = masters_of([rank[HALF] for rank in saved])
    first = [rank[0] for rank in loaded]
    for key, master in masters_of(first).items():
        assert torch.equal(master, masters[key]), key
    for one in (one for rank in first for one in rank):
        weight = masters[one.name, 0].bfloat16()
        if reader == "bf16":
            assert torch.equal(one.values, weight), one.name
        else:
            assert all(map(torch.equal, one.forms[0], forms(reader, weight)[0])), one.name
    pairs = zip(losses(tmp_path / "again"), losses(tmp_path / "run")[HALF:], strict=True)
    assert max(abs(a - b) for a, b in pairs) < 0.05


def test_fp8_weights_of_two_optimizers_are_refused() -> None:
    argv = argv_of("tensorwise", "--dion-exclude *layers.1.*.linear_proj.weight")
    with pytest.raises(RankError, match="for which Megatron has one buffer"):
        world(1).fork(train_in_emulated_fp8, argv)
