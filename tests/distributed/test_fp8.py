"""Training with weights kept in FP8: Megatron's own buffers and optimizer, emulated kernels.

The bytes and scales on every rank are compared with those of whole weights, written out here once
more for each recipe.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion_tools.local.world import RankError
from tests.distributed.fp8_weights import (
    RECIPES,
    cast,
    check_forms,
    expected,
    masters_of,
    train_and_keep,
)
from tests.distributed.nursery import DION, TRAINING, Nursery, losses, train
from tests.distributed.recording import check_against_reference, train_recorded
from tests.distributed.test_checkpoints import largest_difference

ITERATIONS = 4
MODEL = (
    "--num-layers 3 --hidden-size 144 --ffn-hidden-size 320 --num-attention-heads 4"
    " --group-query-attention --num-query-groups 2 --kv-channels 24"
    " --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope"
    " --normalization RMSNorm --swiglu --disable-bias-linear"
    " --untie-embeddings-and-output-weights --init-method-std 0.05"
    " --attention-dropout 0 --hidden-dropout 0"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 250"
    " --make-vocab-size-divisible-by 8 --padded-vocab-size 256 --bf16 --train-iters 4"
).split()
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size"
PP2 = "--pipeline-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
# Of mxfp8 all sizes must be multiples of 32.
SIZES = {"mxfp8": "--hidden-size 160 --ffn-hidden-size 448 --kv-channels 32"}
GRIDS = {"dp2": (2, f"{OVERLAP} 80000"), "dp4": (4, ""), "tp2-dp2": (4, f"{TP2} {OVERLAP} 40000")}


def argv_of(recipe: str, *flags: str) -> list[str]:
    fp8 = []
    if recipe in RECIPES:
        fp8 = ["--fp8-emulation", *RECIPES[recipe].split(), *SIZES.get(recipe, "").split()]
    return [*MODEL, *TRAINING, *DION, *fp8, *(word for flag in flags for word in flag.split())]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_and_scales_are_those_of_whole_weights(
    nursery: Nursery, tmp_path: Path, recipe: str, grid: str
) -> None:
    ranks, flags = GRIDS[grid]
    run_dir = tmp_path / "run"
    argv = argv_of(recipe, flags, f"--run-dir {run_dir}")
    kept = nursery.run(ranks, train_and_keep, argv)
    starts = {one.start % one.values.shape[1] for rank in kept for one in rank[0]}
    assert len(starts) > 1, "no cut is within a row"
    steps = [[rank[step] for rank in kept] for step in range(ITERATIONS + 1)]
    assert not torch.equal(steps[0][0][0].values, steps[-1][0][0].values)
    for before, after in itertools.pairwise(steps):
        check_forms(recipe, after, masters_of(before))
    routes = (run_dir / "routing.tsv").read_text().splitlines()
    linear = [route for route in routes if ".linear_" in route and "layer_norm" not in route]
    assert len(linear) == 3 * 7
    assert all("\tdion\tlinear layer, kept in FP8\t" in route for route in linear)


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_dion_updates_fp8_weights_as_the_reference_does(nursery: Nursery, recipe: str) -> None:
    records = nursery.run(4, train_recorded, argv_of(recipe, GRIDS["tp2-dp2"][1]), ITERATIONS)
    check_against_reference(records, 1e-5)


HALF = ITERATIONS // 2


def save(nursery: Nursery, folder: Path, recipe: str, grid: str, *flags: str) -> Any:
    ranks, grid_flags = GRIDS[grid]
    saving = f"--save {folder} --save-interval {HALF} --run-dir {folder / 'run'}"
    return nursery.run(ranks, train_and_keep, argv_of(recipe, grid_flags, saving, *flags))


def load(nursery: Nursery, folder: Path, recipe: str, grid: str, *flags: str) -> Any:
    ranks, grid_flags = GRIDS[grid]
    loading = f"--load {folder} --ckpt-step {HALF}"
    return nursery.run(ranks, train_and_keep, argv_of(recipe, grid_flags, loading, *flags))


@pytest.mark.parametrize("grid", ["dp2", "tp2-dp2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_is_the_same_run(
    nursery: Nursery, tmp_path: Path, recipe: str, grid: str
) -> None:
    undisturbed = save(nursery, tmp_path, recipe, grid)
    again = tmp_path / "again"
    resumed = load(nursery, tmp_path, recipe, grid, f"--run-dir {again}")
    assert losses(again) == losses(tmp_path / "run")[HALF:]
    for before, after in zip(undisturbed, resumed, strict=True):
        for one, other in zip(before[-1], after[-1], strict=True):
            assert torch.equal(one.master, other.master), one.name
            for form, other_form in zip(one.forms, other.forms, strict=True):
                assert torch.equal(form[0], other_form[0]), one.name
                assert torch.equal(form[1], other_form[1]), one.name


def test_a_resumed_run_is_the_same_run_where_weights_shrink(
    nursery: Nursery, tmp_path: Path
) -> None:
    # The largest rounded weight is then larger than the largest master, which scales follow.
    flags = "--weight-decay 10 --lr 2e-3 --lr-warmup-iters 0"
    save(nursery, tmp_path, "delayed", "dp2", flags)
    again = tmp_path / "again"
    load(nursery, tmp_path, "delayed", "dp2", flags, f"--run-dir {again}")
    assert losses(again) == losses(tmp_path / "run")[HALF:]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "mxfp8"])
def test_masters_are_not_rounded_where_no_optimizer_state_is_loaded(
    nursery: Nursery, tmp_path: Path, recipe: str
) -> None:
    sizes = SIZES.get(recipe, "")
    saved = save(nursery, tmp_path, "bf16", "dp2", sizes)
    loaded = load(nursery, tmp_path, recipe, "dp4", "--finetune")
    expected = masters_of([rank[HALF] for rank in saved])
    for key, master in masters_of([rank[0] for rank in loaded]).items():
        assert torch.equal(master, expected[key].bfloat16().float()), key


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_chunks_of_an_interleaved_pipeline_have_their_masters_values(
    nursery: Nursery, recipe: str
) -> None:
    flags = f"{PP2} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
    kept = nursery.run(2, train_and_keep, argv_of(recipe, flags))
    for stage in kept:
        for before, after in itertools.pairwise(stage):
            check_forms(recipe, [after], masters_of([before]))


# What saves, and what loads.
CHANGES = {
    "bf16 to delayed": ("bf16", "delayed"),
    "bf16 to tensorwise": ("bf16", "tensorwise"),
    "bf16 to blockwise": ("bf16", "blockwise"),
    "tensorwise to bf16": ("tensorwise", "bf16"),
    "delayed to blockwise": ("delayed", "blockwise"),
    "bf16 to mxfp8": ("bf16", "mxfp8"),
    "mxfp8 to bf16": ("mxfp8", "bf16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoints_are_of_no_precision(nursery: Nursery, tmp_path: Path, change: str) -> None:
    writer, reader = CHANGES[change]
    sizes = SIZES["mxfp8"] if "mxfp8" in change else ""
    saved = save(nursery, tmp_path, writer, "dp2", sizes)
    loaded = load(nursery, tmp_path, reader, "tp2-dp2", sizes, f"--run-dir {tmp_path / 'again'}")
    whole = masters_of([rank[HALF] for rank in saved])
    first = [rank[0] for rank in loaded]
    masters = masters_of(first)
    for (name, tensor_rank), master in masters.items():
        assert torch.equal(master, part_of(whole[name, 0], name, tensor_rank)), name
    for one in (one for rank in first for one in rank):
        weight = masters[one.name, one.tensor_rank].bfloat16()
        if reader == "bf16":
            assert torch.equal(one.values, weight), one.name
        elif reader == "delayed":
            # Scales begin at one.
            assert torch.equal(one.forms[0][0], cast(weight, torch.tensor(1.0))), one.name
        else:
            right = expected(reader, weight, torch.tensor(0.0))[0]
            assert torch.equal(one.forms[0][0], right[0]), one.name
            assert torch.equal(one.forms[0][1], right[1]), one.name
    assert largest_difference(losses(tmp_path / "again"), losses(tmp_path / "run")[HALF:]) < 0.05


def part_of(weight: Tensor, name: str, tensor_rank: int) -> Tensor:
    """What one of two tensor-parallel ranks has of a whole weight."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return weight.chunk(2, dim=1)[tensor_rank]
    if name.endswith("linear_fc1.weight"):  # gates, then ups
        halves = [half.chunk(2)[tensor_rank] for half in weight.chunk(2)]
        return torch.cat(halves)
    return weight.chunk(2)[tensor_rank]  # whole query groups


EXPERTS = (
    "--num-layers 2 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 96"
    " --moe-token-dispatcher-type alltoall"
)
# Flags, the grid, and what they show.
OTHERS: dict[str, tuple[str, int, str]] = {
    "first and last layers in bf16": ("tensorwise", 2, "--first-last-layers-bf16"),
    "experts": ("blockwise", 2, f"{EXPERTS} --expert-model-parallel-size 2"),
    "pipeline of delayed scaling": (
        "delayed", 2, "--num-layers 4 --pipeline-model-parallel-size 2"
        " --num-layers-per-virtual-pipeline-stage 1",
    ),
    "compressed gradient sync": (
        "tensorwise", 4, "--num-distributed-optimizer-instances 2 --dion-compressed-sync"
        " --clip-grad 0",
    ),
    "several tokens": ("tensorwise", 1, "--mtp-num-layers 1"),
    "context parallel": ("delayed", 2, "--context-parallel-size 2 --micro-batch-size 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_and_grids(nursery: Nursery, tmp_path: Path, case: str) -> None:
    recipe, ranks, flags = OTHERS[case]
    argv = argv_of(recipe, flags, f"--run-dir {tmp_path}")
    records = nursery.run(ranks, train_recorded, argv, ITERATIONS)
    if "compressed" not in case:
        check_against_reference(records, 1e-5)
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.05, found
    routes = (tmp_path / "routing.tsv").read_text().splitlines()
    in_fp8 = {int(r.split(".")[2]) for r in routes if "decoder.layers" in r and "FP8" in r}
    layers = int(argv[len(argv) - 1 - argv[::-1].index("--num-layers") + 1])
    first_and_last = case.startswith("first and last")
    assert in_fp8 == ({1} if first_and_last else set(range(layers)))


def test_fp8_weights_of_two_optimizers_are_refused(nursery: Nursery) -> None:
    argv = argv_of("tensorwise", "--dion-exclude *layers.1.*.linear_proj.weight")
    with pytest.raises(RankError, match="for which Megatron has one buffer"):
        nursery.run(2, train, argv)
