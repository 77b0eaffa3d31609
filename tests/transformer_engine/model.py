"""A model of linear layers whose weights are tensors of Transformer Engine's, for ranks only.

Its own layers cannot be made without a GPU.
"""

from typing import Any

import torch
import transformer_engine_torch as tex
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.tensor import (
    Float8BlockQuantizer,
    Float8BlockwiseQTensor,
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Float8Tensor,
    MXFP8Quantizer,
    MXFP8Tensor,
)

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.optimizer.chain import DionChainedOptimizer
from megatron_dion.optimizer.factory import get_megatron_dion_optimizer
from megatron_dion.optimizer.routing import tag_matrices
from tests.fp8_emulation.scaling import Form, float_scale
from tests.transformer_engine.kernels import mxfp8_forms

_FP8 = tex.DType.kFloat8E4M3
# Cut by ranks within rows, and within blocks. Of mxfp8 all sizes must be multiples of 32.
_SHAPES = {"first": (160, 208), "second": (48, 144), "third": (37, 80)}
_SHAPES_OF_LINES = {"first": (160, 224), "second": (64, 96), "third": (96, 192)}


def quantized(values: Tensor, recipe: str) -> Any:
    """A weight as Transformer Engine keeps it."""
    amax = values.abs().max().float().view(1)
    whole: dict[str, Any] = {
        "delayed": Float8Quantizer(float_scale(amax), torch.zeros(1), _FP8),
        "tensorwise": Float8CurrentScalingQuantizer(_FP8, values.device),
    }
    tiled: dict[str, Any] = {
        "blockwise": Float8BlockQuantizer(_FP8, rowwise=True, columnwise=True),
        "mxfp8": MXFP8Quantizer(_FP8),
    }
    if recipe in whole:
        data = torch.empty(values.shape, dtype=torch.uint8)
        weight = whole[recipe].create_tensor_from_data(data, values.dtype)
    else:
        weight = tiled[recipe].make_empty(values.shape, dtype=values.dtype, device=values.device)
    weight._get_quantizer().update_quantized(values, weight)
    return weight


def forms_of(weight: Any) -> list[Form]:
    """Bytes and inverse scales for products over columns, and over rows; none of a bf16 weight."""
    match weight:
        case Float8Tensor():
            data, scale_inv = weight._data, weight._scale_inv.view(1, 1)
            has_two = weight._transpose is not None and not weight._transpose_invalid
            over_rows = weight._transpose.T if has_two else data
            return [(data, scale_inv), (over_rows, scale_inv)]
        case Float8BlockwiseQTensor():
            rows, columns = (-(-size // 128) for size in weight.shape)
            return [
                (weight._rowwise_data, weight._rowwise_scale_inv[:rows, :columns]),
                (weight._columnwise_data.T, weight._columnwise_scale_inv[:columns, :rows].T),
            ]
        case MXFP8Tensor():
            return mxfp8_forms(weight)
    return []


class Linear(TransformerEngineBaseModule):
    """Has a weight and a bias, and what keeps their attributes when Megatron calls bfloat16()."""

    primary_weights_in_fp8 = False  # there is no extra state to be loaded before the weight

    def __init__(self, values: Tensor, recipe: str) -> None:
        torch.nn.Module.__init__(self)  # the class's own asks for a GPU
        self.weight = Parameter(values.clone() if recipe == "bf16" else quantized(values, recipe))
        self.bias = Parameter(torch.zeros_like(values[:, 0]))
        if recipe != "bf16":
            # As TransformerEngineBaseModule.reset_parameters leaves them.
            self.weight.get_high_precision_init_val = lambda: values
            self.weight.clear_high_precision_init_val = lambda: None

    def forward(self) -> None:
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: Any, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """Without what the class keeps of scales, which it asks a GPU for."""
        state = {"weight": self.weight, "bias": self.bias}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


class Model(MegatronModule):
    """An embedding and linear layers."""

    def __init__(self, config: TransformerConfig, recipe: str, shapes: dict[str, Any]) -> None:
        super().__init__(config)
        self.embedding = Parameter(torch.randn(50, 16).bfloat16())
        for name, shape in shapes.items():
            # Every block needs another scale, and a wrong one has to show.
            rows, columns = (torch.logspace(-3, 3, size, base=2) for size in shape)
            values = torch.randn(shape) * rows.unsqueeze(1) * columns
            self.add_module(name, Linear(values.bfloat16(), recipe))


class Training:
    """On a rank: Megatron's wrappers around the model, and Dion.

    Args:
        recipe: of FP8, or `bf16`.
        sizes_of: the recipe for which the sizes of the matrices are meant; `recipe` by default.
        seed: of the first weights and the gradients.
    """

    def __init__(self, recipe: str, sizes_of: str = "", seed: int = 1) -> None:
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        torch.manual_seed(seed)
        self.recipe = recipe
        precision: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16}
        gathering: dict[str, Any] = {
            "use_distributed_optimizer": True,
            "reuse_grad_buf_for_mxfp8_param_ag": recipe == "mxfp8",
        }
        config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, **precision)
        shapes = _SHAPES_OF_LINES if (sizes_of or recipe) == "mxfp8" else _SHAPES
        model = tag_matrices([Model(config, recipe, shapes)])[0]
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, fp8_param_gather=recipe != "bf16", **gathering
        )
        self.chunk = DistributedDataParallel(config, ddp_config, Float16Module(config, model))
        self.optimizer: DionChainedOptimizer = get_megatron_dion_optimizer(
            OptimizerConfig(
                lr=0.02,
                weight_decay=0.1,
                fp8_recipe=None if recipe == "bf16" else recipe,
                **precision,
                **gathering,
            ),
            [self.chunk],
            DionConfig(),
        )

    @property
    def weights(self) -> list[Parameter]:
        """The matrices."""
        return [module.weight for module in self.chunk.modules() if isinstance(module, Linear)]

    def step(self) -> None:
        """With random gradients, the same on all ranks."""
        self.chunk.zero_grad_buffer()
        for parameter in self.chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape))
        self.chunk.finish_grad_sync()
        assert self.optimizer.step()[0]

    def amaxes(self) -> list[Tensor]:
        """With delayed scaling, the largest magnitudes seen since the last call; makes scales."""
        found = []
        for weight in self.weights if self.recipe == "delayed" else []:
            quantizer = weight._get_quantizer()
            quantizer.scale.copy_(float_scale(quantizer.amax))
            found.append(quantizer.amax.clone())
            quantizer.amax.zero_()
        return found

    def state(self, is_loading: bool = False) -> dict[str, Any]:
        """For a checkpoint, as Megatron asks for it."""
        model = self.chunk.module.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what was loaded for `state`."""
        self.chunk.load_state_dict(state["model"], strict=False)  # there is no extra state
        self.optimizer.load_state_dict(state["optimizer"])
