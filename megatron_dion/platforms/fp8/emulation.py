"""Joins the emulation of FP8 to Megatron's models, linear layers and buffers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import transformer_config
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megatron_dion.platforms.cpu import Patch
from megatron_dion.platforms.fp8 import weights
from megatron_dion.platforms.fp8.linear import Fp8Linear, check_sizes
from megatron_dion.platforms.fp8.operands import DelayedScaling, Recipe

_STATE = "emulated_fp8"


def install() -> None:
    """Replaces what Megatron leaves to Transformer Engine; before a model's config is made."""
    if not _installed:
        for patch in _patches():
            patch.apply()
        _installed.append(True)


def emulate_fp8(model_chunks: list[MegatronModule]) -> list[MegatronModule]:
    """Lets the linear layers of transformer layers compute in FP8, as the model's config says.

    A `pre_wrap_hooks` function of Megatron's models. These are the layers that Transformer Engine
    would run in FP8: all but the output layer and the layers of `--first-last-layers-bf16`. With
    `config.fp8_param` their weights are kept in FP8 too. `install` comes first.

    Raises:
        ValueError: a weight has sizes that CUDA would refuse.
    """
    for chunk in model_chunks:
        config = chunk.config
        recipe = Recipe.of(str(getattr(config.fp8_recipe, "value", config.fp8_recipe)), config.fp8)
        layers = []
        for name, module in _linear_layers(chunk):
            layers.append(_attach(name, module, recipe, config))
        scalings = [scaling for layer in layers for scaling in layer.delayed]
        if scalings:
            _update_after_backward(chunk, _Delayed(scalings, config))
    return model_chunks


def _linear_layers(chunk: Module) -> Iterator[tuple[str, Module]]:
    in_bf16 = {id(module) for layer in _bf16_layers(chunk) for module in layer.modules()}
    for name, module in chunk.named_modules():
        is_linear = isinstance(module, ColumnParallelLinear | RowParallelLinear)
        if is_linear and id(module) not in in_bf16 and not name.endswith("output_layer"):
            yield name, module


def _bf16_layers(chunk: Module) -> Iterator[Module]:
    blocks: list[Any] = [
        module for module in chunk.modules() if isinstance(module, TransformerBlock)
    ]
    for block in blocks:
        for layer in block.layers:
            if is_first_last_bf16_layer(block.config, layer.layer_number - 1):
                yield layer


def _attach(name: str, module: Any, recipe: Recipe, config: TransformerConfig) -> Fp8Linear:
    rows, columns = module.weight.shape
    check_sizes(name, recipe, {"outputs": rows, "inputs": columns})
    layer = Fp8Linear(
        name,
        recipe,
        history_length=config.fp8_amax_history_len,
        algorithm=config.fp8_amax_compute_algo,
        margin=config.fp8_margin,
    )
    setattr(module, _STATE, layer)
    if config.fp8_param:
        weights.keep_in_fp8(module.weight, recipe, layer.delayed[1] if layer.delayed else None)
        module.register_load_state_dict_post_hook(
            lambda loaded, _: weights.take_values(loaded.weight)
        )
    return layer


class _Delayed:
    """Updates delayed scalings with the largest magnitudes of all ranks."""

    def __init__(self, scalings: list[DelayedScaling], config: TransformerConfig) -> None:
        self._scalings = scalings
        self._group = parallel_state.get_amax_reduction_group(
            with_context_parallel=True, tp_only_amax_red=config.tp_only_amax_red
        )

    def update(self, *_: Any) -> None:
        """A collective call, with what was seen since the last one."""
        amax = torch.stack([scaling.amax for scaling in self._scalings])
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=self._group)
        for scaling, largest in zip(self._scalings, amax, strict=True):
            scaling.update(largest)


def _update_after_backward(chunk: Module, delayed: _Delayed) -> None:
    """Updates when the gradient of the transformer block's input is there: all others are too.

    Nothing that only this rank has seen is pending then, in particular not in a checkpoint.
    """

    def before_forward(block: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        given: Any = options.get("hidden_states", inputs[0] if inputs else None)
        hidden = given if block.pre_process else block.input_tensor
        if torch.is_grad_enabled():
            hidden.register_hook(delayed.update)

    for module in chunk.modules():
        if isinstance(module, TransformerBlock):
            module.register_forward_pre_hook(before_forward, with_kwargs=True)


def _emulated(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A linear layer's product, in FP8 where `emulate_fp8` has been."""

    def forward_impl(
        self: Module, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        layer: Fp8Linear | None = getattr(self, _STATE, None)
        if layer is None:
            return stock(self, input, weight, *args, **kwargs)
        group = kwargs["tp_group"]
        if kwargs["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=group)
        elif kwargs["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=group)
        output = layer.product(input, weight)
        return output if kwargs["bias"] is None else output + kwargs["bias"]

    return forward_impl


def _get_extra_state(self: Module) -> Any:
    layer: Fp8Linear | None = getattr(self, _STATE, None)
    if layer is None or not layer.delayed:
        return None
    return [scaling.state() for scaling in layer.delayed]


def _set_extra_state(self: Module, state: Any) -> None:
    layer: Fp8Linear | None = getattr(self, _STATE, None)
    if layer is None or not layer.delayed or state is None:
        return
    if not isinstance(state, list):
        raise ValueError(
            "the checkpoint's scales of --fp8-recipe delayed are Transformer Engine's, which "
            "--fp8-emulation cannot read: use another recipe"
        )
    if state:
        for scaling, saved in zip(layer.delayed, state, strict=True):
            scaling.load_state(saved)


def _is_te_min_version(stock: Callable[..., bool]) -> Callable[..., bool]:
    """The emulation knows experts without tokens, for which Megatron wants a recent version."""

    def is_te_min_version(version: str, check_equality: bool = True) -> bool:
        return version == "1.7.0.dev0" or stock(version, check_equality)

    return is_te_min_version


_installed: list[bool] = []


def _patches() -> list[Patch]:
    product = "MC/tensor_parallel/layers.py:1094, 1424 choose the product of a linear layer"
    state = "MC/tensor_parallel/layers.py:1229, 1508: Transformer Engine's scales are saved here"
    fp8 = "MC/fp8_utils.py knows Transformer Engine's tensors only"
    buffers, optimizers = param_and_grad_buffer, distrib_optimizer
    return [
        *(
            patch
            for layer in (ColumnParallelLinear, RowParallelLinear)
            for patch in (
                Patch(layer, "_forward_impl", _emulated(layer._forward_impl), product),
                Patch(layer, "get_extra_state", _get_extra_state, state),
                Patch(layer, "set_extra_state", _set_extra_state, state),
            )
        ),
        Patch(
            transformer_config,
            "is_te_min_version",
            _is_te_min_version(transformer_config.is_te_min_version),
            "MC/transformer/transformer_config.py:2296 refuses experts in FP8",
        ),
        Patch(buffers, "is_float8tensor", weights.is_fp8, fp8),
        Patch(buffers, "is_mxfp8tensor", weights.is_mxfp8, fp8),
        Patch(buffers, "modify_underlying_storage", weights.move_to, fp8),
        Patch(buffers, "post_all_gather_processing", weights.show_values, fp8),
        Patch(buffers, "copy_tensor_to_quantized_param", weights.copy_into, fp8),
        Patch(optimizers, "is_float8tensor", weights.is_fp8, fp8),
        Patch(optimizers, "quantize_param_shard", weights.quantize_pieces, fp8),
        Patch(optimizers, "dequantize_fp8_tensor", weights.values_of, fp8),
    ]
