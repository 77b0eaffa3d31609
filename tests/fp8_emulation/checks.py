"""What there is of FP8 weights on each rank, compared with whole weights in FP8.

The arithmetic of the recipes is written out here once more, tile by tile.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.distributed.nursery import train
from tests.fp8_emulation.weights import fp8_of, install

_FP8 = "--fp8-param-gather --fp8-format"
RECIPES = {
    "delayed": f"{_FP8} hybrid --fp8-recipe delayed",
    "tensorwise": f"{_FP8} hybrid --fp8-recipe tensorwise",
    "blockwise": f"{_FP8} e4m3 --fp8-recipe blockwise",
    "mxfp8": f"{_FP8} e4m3 --fp8-recipe mxfp8 --reuse-grad-buf-for-mxfp8-param-ag",
}
Form = tuple[Tensor, Tensor]
FormsOf = Callable[[Any], list[Form]]
_TILES = {"blockwise": (128, 128), "mxfp8": (1, 32)}


@dataclass
class Kept:
    """A weight on a rank after a step.

    Attributes:
        name: of the parameter.
        tensor_rank: tensor-parallel rank.
        start: place of `master` in the flattened weight.
        master: this rank's piece.
        values: what the model computes with, as a parameter shows it.
        forms: bytes and scale_inv, for products over columns and rows; none if it is in bf16.
    """

    name: str
    tensor_rank: int
    start: int
    master: Tensor
    values: Tensor
    forms: list[tuple[Tensor, Tensor]]


def emulated_forms(weight: Any) -> list[Form]:
    """Both forms of a weight that the emulation keeps."""
    fp8 = fp8_of(weight)
    return [] if fp8 is None else fp8.forms()


def train_in_emulated_fp8(argv: Sequence[str]) -> list[list[Kept]]:
    """On a rank: as `train_and_keep`, where weights in FP8 are emulated."""
    install()
    return train_and_keep(argv, emulated_forms)


def train_and_keep(argv: Sequence[str], forms_of: FormsOf) -> list[list[Kept]]:
    """On a rank: trains; what there is of each weight before the first step and after each."""
    from megatron.training import training

    kept: list[list[Kept]] = []
    train_step = training.train_step

    @functools.wraps(train_step)
    def watched(*args: Any, **options: Any) -> Any:
        model, optimizer = args[2], args[3]
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        if not kept:
            kept.append(weights_of(parameters, optimizer, forms_of))
        result = train_step(*args, **options)
        if optimizer.config.overlap_param_gather:
            optimizer.prepare_model_params_for_param_sync()
            for chunk in model:
                chunk.start_param_sync(force_sync=True)
                chunk.reset_param_sync_dispatch_state()
        kept.append(weights_of(parameters, optimizer, forms_of))
        return result

    training.train_step = watched
    train(argv)
    return kept


def weights_of(parameters: Iterable[Any], optimizer: Any, forms_of: FormsOf) -> list[Kept]:
    """What there is now of the weights among the parameters that are Dion's."""
    from megatron_dion.optimizer.checkpoint import MASTER, flat_states
    from megatron_dion.optimizer.routing import tensor_parallel_group, weight_of

    states = (state for one in optimizer.chained_optimizers for state in flat_states(one))
    masters = {
        parameter: (start, flat) for parameter, start, kind, flat in states if kind == MASTER
    }
    found = []
    for parameter in parameters:
        if (weight := weight_of(parameter)) is None:
            continue
        start, master = masters.get(parameter, (0, torch.empty(0)))
        found.append(
            Kept(
                weight.name,
                tensor_parallel_group(parameter).rank(),
                start,
                master.cpu().clone(),
                parameter.detach().float().bfloat16().cpu(),
                [(data.cpu().clone(), scale.cpu().clone()) for data, scale in forms_of(parameter)],
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
            exponent = (
                torch.frexp(torch.tensor(448.0) / weight[block].abs().max().float()).exponent - 1
            )
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
        spread = (1, 1) if recipe in ("delayed", "tensorwise") else _TILES[recipe]
        scale_inv = one.forms[0][1]
        for dim, times in enumerate(spread):
            scale_inv = scale_inv.repeat_interleave(times, dim) if times > 1 else scale_inv
        scale_inv = scale_inv[: shown.shape[0], : shown.shape[1]]
        assert torch.equal(one.values, (shown * scale_inv).bfloat16()), one.name
