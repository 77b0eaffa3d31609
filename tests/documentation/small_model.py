"""What comes before a script of docs/switching.md: a process group and a small model."""

import atexit
import os

import torch

from megatron_dion.platforms import cpu

cpu.install(hide_gpus=True)

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
torch.distributed.init_process_group("gloo", rank=0, world_size=1)
# Without this call gloo's threads abort some processes at their exit.
atexit.register(torch.distributed.destroy_process_group)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
transformer_config = TransformerConfig(
    num_layers=2, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True
)
model = GPTModel(
    transformer_config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16
)
