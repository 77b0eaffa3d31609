"""What there is of FP8 weights on each rank, compared with whole weights in FP8."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fp8_emulation.scaling import Form, forms, values
from tests.fp8_emulation.weights import fp8_of, install, is_fp8
from tests.worlds import train

_FP8 = "--fp8-param-gather --fp8-format"
RECIPES = {
    "delayed": f"{_FP8} hybrid --fp8-recipe delayed",
    "tensorwise": f"{_FP8} hybrid --fp8-recipe tensorwise",
    "blockwise": f"{_FP8} e4m3 --fp8-recipe blockwise",
    "mxfp8": f"{_FP8} e4m3 --fp8-recipe mxfp8 --reuse-grad-buf-for-mxfp8-param-ag",
}
FormsOf = Callable[[Any], list[Form]]


@dataclass
class RankWeight:
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
    forms: list[Form]


def train_in_emulated_fp8(argv: Sequence[str]) -> list[list[RankWeight]]:
    """On a rank: as `train_and_record`, where weights in FP8 are emulated."""
    install()
    return train_and_record(argv, lambda weight: fp8_of(weight).forms if is_fp8(weight) else [])


def train_and_record(argv: Sequence[str], forms_of: FormsOf) -> list[list[RankWeight]]:
    """On a rank: trains; what there is of each weight before the first step and after each."""
    from megatron.training import training

    recorded: list[list[RankWeight]] = []
    train_step = training.train_step

    @functools.wraps(train_step)
    def watched(*args: Any, **options: Any) -> Any:
        model, optimizer = args[2], args[3]
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        if not recorded:
            recorded.append(weights_of(parameters, optimizer, forms_of))
        result = train_step(*args, **options)
        if optimizer.config.overlap_param_gather:
            optimizer.prepare_model_params_for_param_sync()
            for chunk in model:
                chunk.start_param_sync(force_sync=True)
                chunk.reset_param_sync_dispatch_state()
        recorded.append(weights_of(parameters, optimizer, forms_of))
        return result

    training.train_step = watched
    train(argv)
    return recorded


def weights_of(parameters: Iterable[Any], optimizer: Any, forms_of: FormsOf) -> list[RankWeight]:
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
            RankWeight(
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


def masters_of(ranks: Sequence[list[RankWeight]]) -> dict[Key, Tensor]:
    """The whole master weight of each tensor-parallel rank, from all data-parallel ranks."""
    whole: dict[Key, Tensor] = {}
    for weight in (one for rank in ranks for one in rank):
        flat = whole.setdefault(
            (weight.name, weight.tensor_rank), torch.full(weight.values.shape, torch.nan)
        )
        flat.view(-1)[weight.start : weight.start + weight.master.numel()] = weight.master
    assert all(weight.isfinite().all() for weight in whole.values())
    return whole


def check_forms(recipe: str, ranks: Sequence[list[RankWeight]], before: dict[Key, Tensor]) -> None:
    """All weights of all ranks in one step, `before` being the masters of the step before."""
    masters = masters_of(ranks)
    for one in (one for rank in ranks for one in rank):
        weight = masters[one.name, one.tensor_rank].bfloat16()
        others = [master for (name, _), master in before.items() if name == one.name]
        last = torch.stack([other.bfloat16().abs().max() for other in others]).max().float()
        right = forms(recipe, weight, last if recipe == "delayed" else None)
        for (data, scale_inv), (right_data, right_scale_inv) in zip(one.forms, right, strict=True):
            assert torch.equal(scale_inv, right_scale_inv), one.name
            assert torch.equal(data, right_data), one.name
        assert torch.equal(one.values, values(recipe, one.forms[0]).bfloat16()), one.name
