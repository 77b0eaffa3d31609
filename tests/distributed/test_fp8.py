"""Training with weights kept in FP8: Megatron's own buffers and optimizer, emulated kernels.

The bytes and scales on every rank are compared with those of whole weights, written out here once
more for each recipe.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.nursery import DION, TRAINING, Nursery, losses, train
from tests.distributed.recording import check_against_reference, train_recorded

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
FP8 = "--fp8-emulation --fp8-param-gather --fp8-format"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
RECIPES = {
    "delayed": f"{FP8} hybrid --fp8-recipe delayed",
    "tensorwise": f"{FP8} hybrid --fp8-recipe tensorwise",
    "blockwise": f"{FP8} e4m3 --fp8-recipe blockwise",
    "mxfp8": f"{FP8} e4m3 --fp8-recipe mxfp8 --reuse-grad-buf-for-mxfp8-param-ag",
}
# Of mxfp8 all sizes must be multiples of 32.
SIZES = {"mxfp8": "--hidden-size 160 --ffn-hidden-size 448 --kv-channels 32"}
GRIDS = {"dp2": (2, f"{OVERLAP} 80000"), "dp4": (4, ""), "tp2-dp2": (4, f"{TP2} {OVERLAP} 40000")}


def argv_of(recipe: str, *flags: str) -> list[str]:
    fp8 = [*RECIPES[recipe].split(), *SIZES.get(recipe, "").split()] if recipe in RECIPES else []
    return [*MODEL, *TRAINING, *DION, *fp8, *(word for flag in flags for word in flag.split())]


@dataclass
class Kept:
    """A weight on a rank after a step.

    Attributes:
        name: of the parameter.
        tensor_rank: tensor-parallel rank.
        start: place of `master` in the flattened weight.
        master: this rank's piece.
        values: what the model computes with, as a parameter shows it.
        forms: bytes and scale_inv, of one or two forms of the weight; none if it is in bf16.
    """

    name: str
    tensor_rank: int
    start: int
    master: Tensor
    values: Tensor
    forms: list[tuple[Tensor, Tensor]]


def train_and_keep(argv: Sequence[str]) -> list[list[Kept]]:
    """On a rank: trains; what there is of each weight before the first step and after each."""
    from megatron.training import training

    kept: list[list[Kept]] = []
    train_step = training.train_step

    @functools.wraps(train_step)
    def watched(*args: Any, **options: Any) -> Any:
        model, optimizer = args[2], args[3]
        if not kept:
            kept.append(weights_of(model, optimizer))
        result = train_step(*args, **options)
        if optimizer.config.overlap_param_gather:
            optimizer.prepare_model_params_for_param_sync()
            for chunk in model:
                chunk.start_param_sync(force_sync=True)
                chunk.reset_param_sync_dispatch_state()
        kept.append(weights_of(model, optimizer))
        return result

    training.train_step = watched
    train(argv)
    return kept


def weights_of(model: Any, optimizer: Any) -> list[Kept]:
    from megatron_dion.optimizer.routing import tensor_parallel_rank, weight_of
    from megatron_dion.optimizer.state_space import pieces
    from megatron_dion.platforms.fp8.weights import fp8_of

    held = {piece.parameter: piece for one in optimizer.chained_optimizers for piece in pieces(one)}
    found = []
    for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
        if (weight := weight_of(parameter)) is None:
            continue
        piece, fp8 = held.get(parameter), fp8_of(parameter)
        forms = []
        if fp8 is not None:
            forms = [(fp8.data, fp8.scale_inv), (fp8.data_over_rows, fp8.scale_inv_over_rows)]
        found.append(
            Kept(
                weight.name,
                tensor_parallel_rank(parameter),
                piece.start if piece else 0,
                piece.tensors["param"].clone() if piece else torch.empty(0),
                parameter.detach().clone(),
                [(data.clone(), scale_inv.clone()) for data, scale_inv in forms],
            )
        )
    return found


Key = tuple[str, int]


def masters_of(ranks: Sequence[list[Kept]]) -> dict[Key, Tensor]:
    """The whole master weight of each tensor-parallel rank, from all data-parallel ranks."""
    whole: dict[Key, Tensor] = {}
    for kept in (one for rank in ranks for one in rank):
        flat = whole.setdefault(
            (kept.name, kept.tensor_rank), torch.full(kept.values.shape, torch.nan)
        )
        flat.view(-1)[kept.start : kept.start + kept.master.numel()] = kept.master
    assert all(weight.isfinite().all() for weight in whole.values())
    return whole


def cast(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def with_one_scale(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return cast(weight, scale), scale.reciprocal().view(1, 1)


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 128 x 128, scaled by powers of two."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    data, scale_inv = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            exponent = torch.frexp(448 / weight[block].abs().max().float()).exponent - 1
            data[block] = cast(weight[block], 2.0**exponent)
            scale_inv[i, j] = 2.0**-exponent
    return data, scale_inv


def in_lines(weight: Tensor) -> tuple[Tensor, Tensor]:
    """32 numbers of a row with an E8M0 scale."""
    lines = weight.view(weight.shape[0], -1, 32)  # (rows, columns / 32, 32)
    mantissa, exponent = torch.frexp(lines.abs().amax(2).float() * (1 / 448))
    exponent -= (mantissa == 0.5).int()
    data = cast(lines, 2.0 ** -exponent.unsqueeze(2)).view(weight.shape)
    return data, 2.0**exponent


def expected(recipe: str, weight: Tensor, last: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both forms of a whole weight; `last` is the largest magnitude that delayed scaling knows."""
    if recipe == "mxfp8":
        data, scale_inv = in_lines(weight.T.contiguous())
        return [in_lines(weight), (data.T, scale_inv.T)]
    if recipe == "blockwise":
        return [in_blocks(weight)] * 2
    largest = last if recipe == "delayed" else weight.abs().max().float()
    # Not `448 / largest`, which torch makes the reciprocal times 448.
    return [with_one_scale(weight, torch.tensor(448.0) / largest)] * 2


def check_forms(recipe: str, ranks: Sequence[list[Kept]], before: dict[Key, Tensor]) -> None:
    """All weights of all ranks in one step, `before` being the masters of the step before."""
    masters = masters_of(ranks)
    for one in (one for rank in ranks for one in rank):
        weight = masters[one.name, one.tensor_rank].bfloat16()
        others = [master for (name, _), master in before.items() if name == one.name]
        last = torch.stack([other.bfloat16().abs().max() for other in others]).max().float()
        forms = expected(recipe, weight, last)
        for (data, scale_inv), (right_data, right_scale_inv) in zip(one.forms, forms, strict=True):
            assert torch.equal(scale_inv, right_scale_inv), one.name
            assert torch.equal(data, right_data), one.name
        shown = one.forms[0][0].view(torch.float8_e4m3fn).float()
        spread = (1, 1) if recipe in ("delayed", "tensorwise") else TILES[recipe]
        scale_inv = one.forms[0][1]
        for dim, times in enumerate(spread):
            scale_inv = scale_inv.repeat_interleave(times, dim) if times > 1 else scale_inv
        scale_inv = scale_inv[: shown.shape[0], : shown.shape[1]]
        assert torch.equal(one.values, (shown * scale_inv).bfloat16()), one.name


TILES = {"blockwise": (128, 128), "mxfp8": (1, 32)}


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


# What saves, and what loads.
CHANGES = {
    "bf16 to delayed": ("bf16", "delayed"),
    "bf16 to tensorwise": ("bf16", "tensorwise"),
    "bf16 to blockwise": ("bf16", "blockwise"),
    "tensorwise to bf16": ("tensorwise", "bf16"),
    "delayed to blockwise": ("delayed", "blockwise"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoints_are_of_no_precision(nursery: Nursery, tmp_path: Path, change: str) -> None:
    writer, reader = CHANGES[change]
    saved = save(nursery, tmp_path, writer, "dp2")
    loaded = load(nursery, tmp_path, reader, "tp2-dp2", f"--run-dir {tmp_path / 'again'}")
    expected = masters_of([rank[HALF] for rank in saved])
    first = [rank[0] for rank in loaded]
    for (name, tensor_rank), master in masters_of(first).items():
        whole = expected[name, 0]
        assert torch.equal(master, part_of(whole, name, tensor_rank)), name
    for one in (one for rank in first for one in rank):
        weight = masters_of(first)[one.name, one.tensor_rank].bfloat16()
        if reader == "bf16":
            assert torch.equal(one.values, weight), one.name
        elif reader == "delayed":
            # Scales begin at one.
            assert torch.equal(one.forms[0][0], cast(weight, torch.tensor(1.0))), one.name
        else:
            right = cast_and_scales(reader, weight)
            assert torch.equal(one.forms[0][0], right[0]), one.name
            assert torch.equal(one.forms[0][1], right[1]), one.name
    assert largest_difference(losses(tmp_path / "again"), losses(tmp_path / "run")[HALF:]) < 0.05


def cast_and_scales(recipe: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    return expected(recipe, weight, torch.tensor(0.0))[0]


def part_of(weight: Tensor, name: str, tensor_rank: int) -> Tensor:
    """What one of two tensor-parallel ranks has of a whole weight."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return weight.chunk(2, dim=1)[tensor_rank]
    if name.endswith("linear_fc1.weight"):  # gates, then ups
        halves = [half.chunk(2)[tensor_rank] for half in weight.chunk(2)]
        return torch.cat(halves)
    return weight.chunk(2)[tensor_rank]  # whole query groups


def largest_difference(found: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, right, strict=True))


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
