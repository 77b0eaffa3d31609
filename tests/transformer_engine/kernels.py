"""Stand-ins for the CUDA kernels of Transformer Engine that weights kept in FP8 need.

Transformer Engine decides in Python what is computed from which piece of a weight; only what it
then calls is replaced. Signatures are those of csrc/extensions in its source distribution.
"""

from typing import Any

import torch
import transformer_engine_torch as tex
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor
from transformer_engine.pytorch.tensor import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    MXFP8Quantizer,
    utils,
)
from transformer_engine.pytorch.tensor.storage import mxfp8_tensor_storage

from tests.fp8_emulation.scaling import (
    LARGEST,
    Form,
    ScaleRule,
    Tiles,
    cast,
    e8m0_scale,
    float_scale,
    power_of_two_scale,
    tiles_of,
    values,
)
from tests.fp8_emulation.weights import one_type_at_a_time

_BLOCK = 128


def install() -> None:
    """Replaces the kernels, for the whole process."""
    for kernel in (
        quantize,
        compute_amax,
        fp8_block_scaling_compute_partial_amax,
        fp8_block_scaling_partial_cast,
        fp8_transpose,
    ):
        _rebind(tex, kernel.__name__, kernel)
    # From here on, what other modules have imported by name.
    _rebind(param_and_grad_buffer, "_coalescing_manager", one_type_at_a_time)
    _rebind(utils, "multi_tensor_scale", local_multi_tensor_scale)
    _rebind(
        utils, "multi_tensor_compute_scale_and_scale_inv", multi_tensor_compute_scale_and_scale_inv
    )
    _rebind(optimizer, "multi_tensor_scale_impl", local_multi_tensor_scale)
    _rebind(clip_grads, "multi_tensor_scale_tensor_impl", local_multi_tensor_scale)
    _rebind(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    # It copies to a GPU before it calls its kernel.
    _rebind(mxfp8_tensor_storage._FromMXFP8Func, "forward", staticmethod(_values_of_mxfp8))


def _rebind(owner: Any, name: str, kernel: Any) -> None:
    assert hasattr(owner, name), f"{owner.__name__} has no {name}"
    setattr(owner, name, kernel)


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.abs().max())


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int,
    flag: Tensor,
    lists: list[list[Tensor]],
    largest: float,
    powers_of_two: bool,
    epsilon: float,
) -> None:
    assert largest == LARGEST
    rule = _rule(powers_of_two)
    for amax, scale, scale_inv in zip(*lists, strict=True):
        scale.copy_(rule(amax.clamp(min=epsilon)))
        scale_inv.copy_(scale.reciprocal())


def fp8_block_scaling_compute_partial_amax(
    piece: Tensor, amax: Tensor, rows: int, columns: int, start: int, block: int
) -> None:
    tiles = Tiles(rows, columns, block, block)
    _unpadded(amax, tiles).copy_(tiles.amax_of_piece(piece, start))


def fp8_block_scaling_partial_cast(
    piece: Tensor,
    out: Tensor,
    scale: Tensor,
    rows: int,
    columns: int,
    start: int,
    block: int,
    dtype: Any,
) -> None:
    tiles = Tiles(rows, columns, block, block)
    of_elements = tiles.of_elements(start, start + piece.numel())
    scales = _unpadded(scale, tiles).flatten()[of_elements]
    _put(out, cast(piece, scales))


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None) -> Tensor:
    transposed = data.T.contiguous()
    return transposed if out is None else out.copy_(transposed)


def quantize(whole: Tensor, quantizer: Any, output: Any, noop: Tensor | None = None) -> None:
    """As a scale that is given, or that the values need, makes them."""
    whole = whole.detach()
    match quantizer:
        case Float8Quantizer():
            _quantize_whole(whole, quantizer.scale, output)
            if quantizer.amax.numel():
                quantizer.amax.clamp_(min=whole.abs().max().float())
        case Float8CurrentScalingQuantizer():
            amax = whole.abs().max().float().clamp(min=quantizer.amax_epsilon).view(1)
            _quantize_whole(whole, _rule(quantizer.force_pow_2_scales)(amax), output)
        case Float8BlockQuantizer():
            tiles = Tiles(*whole.shape, _BLOCK, _BLOCK)
            amax = tiles.amax(whole).clamp(min=quantizer.amax_epsilon)
            scale = _rule(quantizer.force_pow_2_scales)(amax)
            _put(output._rowwise_data, cast(whole, tiles.spread(scale)))
            _unpadded(output._rowwise_scale_inv, tiles).copy_(scale.reciprocal())
            output._create_columnwise()
        case MXFP8Quantizer():
            for data, scale_inv, tiles in _mxfp8_forms(output):
                scale = e8m0_scale(tiles.amax(whole))
                _put(data, cast(whole, tiles.spread(scale)))
                exponents = torch.frexp(scale.reciprocal()).exponent - 1
                _unpadded(scale_inv, tiles).copy_(exponents + 127)


def _quantize_whole(whole: Tensor, scale: Tensor, output: Any) -> None:
    _put(output._data, cast(whole, scale))
    output._scale_inv.copy_(scale.reciprocal())
    output._reset_caches()


def mxfp8_forms(tensor: Any) -> list[Form]:
    """Bytes and inverse scales, the form for products over columns first."""
    return [
        (data, 2.0 ** (_unpadded(scale_inv, tiles).float() - 127))
        for data, scale_inv, tiles in _mxfp8_forms(tensor)
    ]


def _mxfp8_forms(tensor: Any) -> list[tuple[Tensor, Tensor, Tiles]]:
    tiles = tiles_of("mxfp8", tensor._rowwise_data.shape)
    return [
        (tensor._rowwise_data, tensor._rowwise_scale_inv, tiles[0]),
        (tensor._columnwise_data, tensor._columnwise_scale_inv, tiles[1]),
    ]


def _values_of_mxfp8(context: Any, tensor: Any, dtype: torch.dtype) -> Tensor:
    return values("mxfp8", mxfp8_forms(tensor)[0]).to(dtype)


def _rule(powers_of_two: bool) -> ScaleRule:
    return power_of_two_scale if powers_of_two else float_scale


def _unpadded(scales: Tensor, tiles: Tiles) -> Tensor:
    down, across = tiles.counts
    return scales[:down, :across]


def _put(data: Tensor, rounded: Tensor) -> None:
    data.copy_(rounded.view(data.shape))
