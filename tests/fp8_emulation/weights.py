"""Parameters that are kept in FP8, and what Megatron's buffers and optimizer do with them.

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

from tests.fp8_emulation.scaling import (
    E4M3,
    Tiles,
    cast,
    e8m0_scale,
    float_scale,
    power_of_two_scale,
)

_ATTRIBUTE = "emulated_fp8"
# Height and width of the tiles that have one scale, and how the scale follows from the largest
# magnitude.
_WHOLE = 1 << 62
_RECIPES = {
    "delayed": (_WHOLE, _WHOLE, float_scale),
    "tensorwise": (_WHOLE, _WHOLE, float_scale),
    "blockwise": (128, 128, power_of_two_scale),
    "mxfp8": (1, 32, e8m0_scale),
}


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

    for owner, name, value in (
        (TransformerLayer, "__init__", _with_weights_in_fp8(TransformerLayer.__init__)),
        # Of experts in FP8, Megatron asks for a version (transformer_config.py:2296).
        (transformer_config, "is_te_min_version", lambda *args, **options: True),
        (param_and_grad_buffer, "_coalescing_manager", _one_type_at_a_time),
        (param_and_grad_buffer, "is_float8tensor", is_fp8),
        (param_and_grad_buffer, "is_mxfp8tensor", is_mxfp8),
        (param_and_grad_buffer, "modify_underlying_storage", move_to),
        (param_and_grad_buffer, "post_all_gather_processing", show_values),
        (param_and_grad_buffer, "copy_tensor_to_quantized_param", copy_into),
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
def _one_type_at_a_time(group: Any, async_ops: bool = False) -> Iterator[Any]:
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

    Args:
        parameter: (rows, columns), whose present values are kept.
        recipe: how it is scaled.

    Attributes:
        recipe: how it is scaled.
        tiles: what has one scale.
        data: (rows, columns), uint8.
        scale_inv: float32, one for each tile.
        second_form: with mxfp8, tiles, data and scale_inv for products over rows.
        scale: with delayed scaling, what the next values are multiplied by.
        amax: with delayed scaling, the largest magnitude since `scale` was made.
    """

    def __init__(self, parameter: Parameter, recipe: str) -> None:
        rows, columns = parameter.shape
        height, width, self._rule = _RECIPES[recipe]
        self.recipe = recipe
        self.tiles = Tiles(rows, columns, min(height, rows), min(width, columns))
        self.data = torch.zeros(rows, columns, dtype=torch.uint8)
        self.scale_inv = torch.zeros(self.tiles.counts)
        self.second_form: tuple[Tiles, Tensor, Tensor] | None = None
        if height != width:
            tiles = Tiles(rows, columns, min(width, rows), min(height, columns))
            self.second_form = (tiles, self.data.clone(), torch.zeros(tiles.counts))
        self.scale = torch.tensor(1.0)
        self.amax = torch.tensor(0.0)
        self.take(parameter.detach())

    def take(self, values: Tensor) -> None:
        """Becomes these values, rounded.

        Args:
            values: (rows, columns).
        """
        scale = self.set_scale(self.tiles.amax(values))
        self.set_piece(values.reshape(-1), 0, scale)
        if self.second_form is not None:
            tiles, data, scale_inv = self.second_form
            scale = self._rule(tiles.amax(values), E4M3)
            scale_inv.copy_(scale.reciprocal())
            data.copy_(cast(values, tiles.spread(scale), E4M3).view(torch.uint8))

    def set_scale(self, amax: Tensor) -> Tensor:
        """Scales by the largest magnitudes of the tiles; delayed scaling notes them for later.

        Returns:
            The scales of the tiles, for `set_piece`.
        """
        if self.recipe == "delayed":
            self.amax = amax.max().clone()
            scale = self.scale.view(1, 1)
        else:
            scale = self._rule(amax, E4M3)
        self.scale_inv.copy_(scale.reciprocal())
        return scale

    def set_piece(self, piece: Tensor, start: int, scale: Tensor) -> None:
        """Rounds a piece of the flattened weight with the scales of the tiles."""
        stop = start + piece.numel()
        of_elements = scale.view(-1)[self.tiles.of_elements(start, stop)]
        self.data.view(-1)[start:stop] = cast(piece, of_elements, E4M3).view(torch.uint8)

    def values(self) -> Tensor:
        """What products compute with, float32 (rows, columns)."""
        return self.data.view(E4M3).float() * self.tiles.spread(self.scale_inv)

    def forms(self) -> list[tuple[Tensor, Tensor]]:
        """Bytes and inverse scales, for products over columns and over rows."""
        first = (self.data, self.scale_inv)
        return [first, first if self.second_form is None else self.second_form[1:]]


def keep_in_fp8(parameter: Parameter, recipe: str) -> None:
    """Gives a parameter its FP8 form; it remembers its present values for the master weights."""
    initial = parameter.detach().clone()
    setattr(parameter, _ATTRIBUTE, Fp8Weight(parameter, recipe))
    # What Megatron asks Transformer Engine's weights (MC/optimizer/distrib_optimizer.py:430).
    parameter.get_high_precision_init_val = lambda: initial  # type: ignore[attr-defined]
    parameter.clear_high_precision_init_val = (  # type: ignore[attr-defined]
        lambda: delattr(parameter, "get_high_precision_init_val")
    )
    show_values([parameter])


def fp8_of(tensor: Tensor) -> Fp8Weight | None:
    """The FP8 form of a parameter that has one."""
    return getattr(tensor, _ATTRIBUTE, None)


def _take_loaded_values(module: Module, incompatible_keys: Any) -> None:
    # The tensor that was loaded stays as it is: master weights are made of it.
    parameter: Any = module.weight
    getattr(parameter, _ATTRIBUTE).take(parameter.detach())
    parameter.data = values_of(parameter)


# --- in place of Megatron's functions of the names that `install` gives -------------------------


def is_fp8(tensor: Tensor) -> bool:
    return fp8_of(tensor) is not None


def is_mxfp8(tensor: Tensor) -> bool:
    weight = fp8_of(tensor)
    return weight is not None and weight.recipe == "mxfp8"


def move_to(parameter: Parameter, memory: Tensor) -> None:
    weight: Fp8Weight = getattr(parameter, _ATTRIBUTE)
    memory.copy_(weight.data)
    weight.data = memory


def quantize_pieces(
    parameters: Sequence[Parameter],
    masters: Sequence[Tensor | None],
    starts: Sequence[int | None],
    group: dist.ProcessGroup,
) -> None:
    """A collective call, with all FP8 weights of an optimizer and this rank's pieces of masters."""
    weights: list[Fp8Weight] = [getattr(parameter, _ATTRIBUTE) for parameter in parameters]
    if not weights:
        return
    if weights[0].recipe == "delayed":
        _make_delayed_scales(weights)
    # Rounded twice, as weights are that are kept in bf16.
    pieces = [
        None if master is None or start is None else (master.to(parameter.dtype), start)
        for parameter, master, start in zip(parameters, masters, starts, strict=True)
    ]
    amax = [
        weight.tiles.amax_of_piece(*piece) if piece else torch.zeros_like(weight.scale_inv)
        for weight, piece in zip(weights, pieces, strict=True)
    ]
    flat = torch.cat([one.flatten() for one in amax])
    dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
    of_weights = flat.split([one.numel() for one in amax])
    for weight, piece, largest in zip(weights, pieces, of_weights, strict=True):
        scale = weight.set_scale(largest.view_as(weight.scale_inv))
        if piece:
            weight.set_piece(*piece, scale)


def _make_delayed_scales(weights: Sequence[Fp8Weight]) -> None:
    """Of the largest magnitudes that the ranks saw before, as after a backward pass."""
    from megatron.core.parallel_state import get_amax_reduction_group

    amax = torch.stack([weight.amax for weight in weights])
    dist.all_reduce(amax, dist.ReduceOp.MAX, group=get_amax_reduction_group(True))
    for weight, largest in zip(weights, amax, strict=True):
        weight.scale = float_scale(largest, E4M3)


def show_values(parameters: Sequence[Parameter]) -> None:
    for parameter in parameters:
        parameter.data.copy_(getattr(parameter, _ATTRIBUTE).values())


def copy_into(parameter: Parameter, source: Tensor) -> None:
    getattr(parameter, _ATTRIBUTE).take(source.view(parameter.shape))
    show_values([parameter])


def values_of(parameter: Parameter) -> Tensor:
    values: Tensor = getattr(parameter, _ATTRIBUTE).values()
    return values.to(parameter.dtype)
