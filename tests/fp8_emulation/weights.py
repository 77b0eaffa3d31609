"""Parameters that are kept in FP8, tensorwise or in mxfp8, and what Megatron does with them.

A parameter remains an ordinary tensor, which shows the values of its FP8 form; that form is an
attribute of it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager, _world
from torch.nn import Module, Parameter

from tests.fp8_emulation.scaling import Form, cast, float_scale, forms, values

_ATTRIBUTE = "emulated_fp8"


def install() -> None:
    """On a rank, before training: transformer layers keep the weights of linear layers in FP8.

    Which layers, and how, `--fp8-param-gather`, `--fp8-recipe` and `--first-last-layers-bf16` say.
    What Megatron asks Transformer Engine about such weights is answered here.
    """
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_dion.megatron import validation

    copying: tuple[str, Any] = ("copy_tensor_to_quantized_param", copy_into)
    if hasattr(param_and_grad_buffer, "copy_tensors_to_quantized_params"):  # from 0.20 on
        copying = ("copy_tensors_to_quantized_params", copy_all_into)
    for owner, name, value in (
        (TransformerLayer, "__init__", _with_weights_in_fp8(TransformerLayer.__init__)),
        # Of experts in FP8, Megatron asks for a version (transformer_config.py:2296).
        (transformer_config, "is_te_min_version", lambda *args, **options: True),
        (param_and_grad_buffer, "_coalescing_manager", one_type_at_a_time),
        (param_and_grad_buffer, "is_float8tensor", is_fp8),
        (param_and_grad_buffer, "is_mxfp8tensor", is_mxfp8),
        (param_and_grad_buffer, "modify_underlying_storage", move_to),
        (param_and_grad_buffer, "post_all_gather_processing", show_values),
        (param_and_grad_buffer, *copying),
        (distrib_optimizer, "is_float8tensor", is_fp8),
        (distrib_optimizer, "quantize_param_shard", quantize_pieces),
        (distrib_optimizer, "dequantize_fp8_tensor", values_of),
    ):
        assert hasattr(owner, name), f"{owner.__name__} has no {name}"
        setattr(owner, name, value)
    # The one check that asks for Transformer Engine's layers.
    validation.OF_ALL_SCRIPTS = tuple(
        check for check in validation.OF_ALL_SCRIPTS if check is not validation.check_fp8
    )


@contextlib.contextmanager
def one_type_at_a_time(group: Any, async_ops: bool = False) -> Iterator[Any]:
    """In place of torch's `_coalescing_manager`: a gather for each type of tensors.

    Gloo gathers tensors of several types into each other's memory without a word. With FP8 weights
    Megatron gathers bytes and bf16 together (core/distributed/param_and_grad_buffer.py:504).
    """
    with _coalescing_manager(group, async_ops=async_ops) as works:
        yield works
        recorded = list(_world.pg_coalesce_state[group])
        _world.pg_coalesce_state[group].clear()
    for dtype in dict.fromkeys(operation.tensor.dtype for operation in recorded):
        with _coalescing_manager(group, async_ops=async_ops) as of_one_type:
            alike = [operation for operation in recorded if operation.tensor.dtype == dtype]
            _world.pg_coalesce_state[group].extend(alike)
        works.works.extend(of_one_type.works)


def _with_weights_in_fp8(init: Callable[..., None]) -> Callable[..., None]:
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    @functools.wraps(init)
    def new_init(layer: Any, config: Any, *args: Any, **options: Any) -> None:
        init(layer, config, *args, **options)
        if not config.fp8_param or is_first_last_bf16_layer(config, layer.layer_number - 1):
            return
        recipe = str(getattr(config.fp8_recipe, "value", config.fp8_recipe))
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                keep_in_fp8(module.weight, recipe)
                module.register_load_state_dict_post_hook(_take_loaded_values)

    return new_init


class Fp8Weight:
    """The FP8 form of a weight.

    Attributes:
        recipe: how it is scaled.
        forms: for products over columns and over rows; the same one twice but for mxfp8.
    """

    def __init__(self, initial: Tensor, recipe: str) -> None:
        self.recipe = recipe
        self.forms: list[Form] = forms(recipe, initial)

    def take(self, whole: Tensor) -> None:
        """Becomes these values, rounded."""
        for form, new in zip(self.forms, forms(self.recipe, whole), strict=True):
            for tensor, new_values in zip(form, new, strict=True):
                tensor.copy_(new_values)


def keep_in_fp8(parameter: Parameter, recipe: str) -> None:
    """Gives a parameter its FP8 form; it remembers its present values for the master weights."""
    initial = parameter.detach().clone()
    setattr(parameter, _ATTRIBUTE, Fp8Weight(initial, recipe))
    # What Megatron asks Transformer Engine's weights (MC/optimizer/distrib_optimizer.py:430).
    parameter.get_high_precision_init_val = lambda: initial  # type: ignore[attr-defined]
    parameter.clear_high_precision_init_val = (  # type: ignore[attr-defined]
        lambda: delattr(parameter, "get_high_precision_init_val")
    )
    show_values([parameter])


def fp8_of(tensor: Tensor) -> Fp8Weight:
    """The FP8 form of a parameter for which `is_fp8` holds."""
    weight: Fp8Weight = getattr(tensor, _ATTRIBUTE)
    return weight


def _take_loaded_values(module: Module, incompatible_keys: Any) -> None:
    # The tensor that was loaded stays as it is: master weights are made of it.
    parameter: Any = module.weight
    fp8_of(parameter).take(parameter.detach())
    parameter.data = values_of(parameter)


# --- in place of Megatron's functions of the names that `install` gives -------------------------


def is_fp8(tensor: Tensor) -> bool:
    return hasattr(tensor, _ATTRIBUTE)


def is_mxfp8(tensor: Tensor) -> bool:
    return is_fp8(tensor) and fp8_of(tensor).recipe == "mxfp8"


def move_to(parameter: Parameter, memory: Tensor) -> None:
    weight = fp8_of(parameter)
    data, scale_inv = weight.forms[0]
    weight.forms = [(memory.copy_(data), scale_inv)] * 2


def quantize_pieces(
    parameters: Sequence[Parameter],
    masters: Sequence[Tensor | None],
    starts: Sequence[int | None],
    group: dist.ProcessGroup,
) -> None:
    """A collective call, with all FP8 weights of an optimizer and this rank's pieces of masters."""
    if not parameters:
        return
    # Rounded twice, as weights are that are kept in bf16.
    pieces = [None if master is None else master.bfloat16() for master in masters]
    amax = torch.stack(
        [torch.tensor(0.0) if piece is None else piece.abs().max().float() for piece in pieces]
    )
    dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    for parameter, piece, start, scale in zip(
        parameters, pieces, starts, float_scale(amax), strict=True
    ):
        data, scale_inv = fp8_of(parameter).forms[0]
        scale_inv.copy_(scale.reciprocal())
        if piece is not None and start is not None:
            data.view(-1)[start : start + piece.numel()] = cast(piece, scale)


def show_values(parameters: Sequence[Parameter]) -> None:
    for parameter in parameters:
        parameter.data.copy_(values_of(parameter))


def copy_into(parameter: Parameter, source: Tensor) -> None:
    fp8_of(parameter).take(source.view(parameter.shape))
    show_values([parameter])


def copy_all_into(parameters: Sequence[Parameter], sources: Sequence[Tensor]) -> None:
    for parameter, source in zip(parameters, sources, strict=True):
        copy_into(parameter, source)


def values_of(parameter: Parameter) -> Tensor:
    weight = fp8_of(parameter)
    return values(weight.recipe, weight.forms[0]).to(parameter.dtype)
