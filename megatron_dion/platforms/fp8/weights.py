"""Parameters that are kept in FP8, and what Megatron's buffers and optimizer do with them.

Stands in for Transformer Engine's quantized tensors and its cast_master_weights_to_fp8. A parameter
remains an ordinary tensor, which shows the values of its FP8 form; that form is an attribute of it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_dion.platforms.fp8.operands import DelayedScaling, Recipe
from megatron_dion.platforms.fp8.scaling import Tiles, cast

_FP8 = "emulated_fp8"


class Fp8Weight:
    """The FP8 form of a weight.

    Args:
        parameter: (rows, columns), whose present values are kept.
        recipe: how it is scaled.
        delayed: its scaling, if the recipe is `delayed`.

    Attributes:
        data: (rows, columns), uint8.
        scale_inv: float32, one for each tile.
        data_over_rows: with mxfp8, the second form of the weight, for products over its rows.
        scale_inv_over_rows: of that.
    """

    def __init__(
        self, parameter: Parameter, recipe: Recipe, delayed: DelayedScaling | None = None
    ) -> None:
        shape = parameter.shape
        self._recipe = recipe
        self.delayed = delayed
        self._over_columns = recipe.weight_tile.over_columns(shape)
        self._over_rows = recipe.weight_tile.over_rows(shape)
        self.data = torch.zeros(shape, dtype=torch.uint8)
        self.scale_inv = torch.zeros(self._over_columns.counts)
        self.data_over_rows = self.data
        self.scale_inv_over_rows = self.scale_inv
        if not recipe.weight_tile.is_square:
            self.data_over_rows = torch.zeros(shape, dtype=torch.uint8)
            self.scale_inv_over_rows = torch.zeros(self._over_rows.counts)
        self.take(parameter.detach())

    @property
    def recipe(self) -> Recipe:
        return self._recipe

    @property
    def tiles(self) -> Tiles:
        return self._over_columns

    @property
    def has_one_form(self) -> bool:
        """Whether products over rows and over columns use the same bytes."""
        return self.data is self.data_over_rows

    def take(self, values: Tensor) -> None:
        """Becomes these values, rounded.

        Args:
            values: (rows, columns).
        """
        scale = self.set_scale(self.tiles.amax_of_piece(values.reshape(-1), 0))
        self.set_piece(values.reshape(-1), 0, scale)
        if not self.has_one_form:
            scale = self._recipe.rule(self._over_rows.amax(values), self._recipe.forward)
            self.scale_inv_over_rows.copy_(scale.reciprocal())
            spread = self._over_rows.spread(scale)
            self.data_over_rows.copy_(cast(values, spread, self._recipe.forward).view(torch.uint8))

    def amax_of_piece(self, piece: Tensor | None, start: int | None) -> Tensor:
        """Largest magnitudes, by tile, of a piece of the flattened weight, or of none."""
        if piece is None or start is None:
            return torch.zeros_like(self.scale_inv)
        return self.tiles.amax_of_piece(piece, start)

    def set_scale(self, amax: Tensor) -> Tensor:
        """Scales by the largest magnitudes, or notes them for later scales (delayed).

        Returns:
            The scales of the tiles, for `set_piece`.
        """
        if self.delayed is not None:
            self.delayed.amax.copy_(amax.max())  # of these bytes: others are no more
            scale = self.delayed.scale.view(1, 1)
        else:
            scale = self._recipe.rule(amax, self._recipe.forward)
        self.scale_inv.copy_(scale.reciprocal())
        return scale

    def set_piece(self, piece: Tensor, start: int, scale: Tensor) -> None:
        """Rounds a piece of the flattened weight with the scales of the tiles."""
        stop = start + piece.numel()
        of_elements = scale.view(-1)[self.tiles.of_elements(start, stop)]
        rounded = cast(piece, of_elements, self._recipe.forward)
        self.data.view(-1)[start:stop] = rounded.view(torch.uint8)

    def values(self) -> tuple[Tensor, Tensor]:
        """What products over columns, and over rows, calculate with; float32 (rows, columns)."""
        values = self._values(self.data, self._over_columns.spread(self.scale_inv))
        if self.has_one_form:
            return values, values
        scale_inv = self._over_rows.spread(self.scale_inv_over_rows)
        return values, self._values(self.data_over_rows, scale_inv)

    def move_to(self, memory: Tensor) -> None:
        """Keeps the bytes in other memory of the same shape."""
        memory.copy_(self.data)
        self.data = self.data_over_rows = memory

    def _values(self, data: Tensor, scale_inv: Tensor) -> Tensor:
        return data.view(self._recipe.forward).float() * scale_inv


def keep_in_fp8(
    parameter: Parameter, recipe: Recipe, delayed: DelayedScaling | None = None
) -> None:
    """Gives a parameter its FP8 form; it remembers its present values for the master weights."""
    initial = parameter.detach().clone()
    setattr(parameter, _FP8, Fp8Weight(parameter, recipe, delayed))
    # What Megatron asks Transformer Engine's weights (MC/optimizer/distrib_optimizer.py:430).
    parameter.get_high_precision_init_val = lambda: initial  # type: ignore[attr-defined]
    parameter.clear_high_precision_init_val = (  # type: ignore[attr-defined]
        lambda: delattr(parameter, "get_high_precision_init_val")
    )
    show_values([parameter])


def fp8_of(tensor: Tensor) -> Fp8Weight | None:
    """The FP8 form of a parameter that has one."""
    return getattr(tensor, _FP8, None)


def is_fp8(tensor: Tensor) -> bool:
    """Takes the place of Megatron's is_float8tensor."""
    return fp8_of(tensor) is not None


def is_mxfp8(tensor: Tensor) -> bool:
    """Takes the place of Megatron's is_mxfp8tensor."""
    kept = fp8_of(tensor)
    return kept is not None and kept.recipe.name == "mxfp8"


def take_values(parameter: Parameter) -> None:
    """Makes the FP8 form follow a parameter into which something was loaded.

    What was loaded stays as it is, in the state that the parameter was loaded from.
    """
    kept = fp8_of(parameter)
    if kept is not None:
        kept.take(parameter.detach())
        parameter.data = values_of(parameter)


def move_to(parameter: Parameter, memory: Tensor) -> None:
    """Takes the place of Megatron's modify_underlying_storage."""
    _kept(parameter).move_to(memory)


def quantize_pieces(
    parameters: Sequence[Parameter],
    masters: Sequence[Tensor | None],
    starts: Sequence[int | None],
    group: ProcessGroup,
) -> None:
    """Takes the place of Megatron's quantize_param_shard. A collective call.

    Args:
        parameters: all FP8 weights of an optimizer, on every rank in the same order.
        masters: this rank's pieces of their master weights, 1-D.
        starts: their first elements' places.
        group: the ranks that hold the pieces.
    """
    if not parameters:
        return
    kept = [_kept(parameter) for parameter in parameters]
    # Rounded twice, as weights are that are kept in bf16.
    pieces = [
        None if master is None else master.to(parameter.dtype)
        for parameter, master in zip(parameters, masters, strict=True)
    ]
    ranges = list(zip(kept, pieces, starts, strict=True))
    amax = torch.cat([weight.amax_of_piece(piece, at).flatten() for weight, piece, at in ranges])
    dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    sizes = [weight.scale_inv.numel() for weight in kept]
    for (weight, piece, start), part in zip(ranges, amax.split(sizes), strict=True):
        scale = weight.set_scale(part.view_as(weight.scale_inv))
        if piece is not None and start is not None:
            weight.set_piece(piece, start, scale)


def show_values(parameters: Sequence[Parameter]) -> None:
    """Takes the place of Megatron's post_all_gather_processing: bytes came from other ranks."""
    for parameter in parameters:
        parameter.data.copy_(_kept(parameter).values()[0])


def copy_into(parameter: Parameter, source: Tensor) -> None:
    """Takes the place of Megatron's copy_tensor_to_quantized_param (mxfp8)."""
    _kept(parameter).take(source.view(parameter.shape))
    show_values([parameter])


def values_of(parameter: Parameter) -> Tensor:
    """Takes the place of Megatron's dequantize_fp8_tensor."""
    return _kept(parameter).values()[0].to(parameter.dtype)


def _kept(parameter: Tensor) -> Fp8Weight:
    kept = fp8_of(parameter)
    if kept is None:
        raise TypeError("the parameter is not kept in FP8")
    return kept
