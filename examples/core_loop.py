"""A training loop on megatron.core alone, with Dion: nothing of megatron.training.

torchrun --nproc-per-node 4 examples/core_loop.py --tp 2 --iterations 40 --save runs/loop
torchrun --nproc-per-node 2 examples/core_loop.py --iterations 80 --load runs/loop

On GPUs with NCCL; without one on the CPU, where megatron.core needs a stand-in for torch.cuda.
"""

import argparse
import os
from pathlib import Path

import torch

from megatron_dion.platforms import cpu

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    cpu.install()  # before the first import of megatron

from megatron.core import dist_checkpointing, distributed, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_dion import DionConfig
from megatron_dion.optimizer.factory import get_megatron_dion_optimizer
from megatron_dion.optimizer.routing import tag_matrices

VOCABULARY, LENGTH, SAMPLES, SEED = 128, 32, 16, 1234  # samples of all ranks in an iteration
LR, WARMUP, WEIGHT_DECAY = 4e-3, 10, 0.1
SIZES = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
# Weights then do not depend on the tensor-parallel size, nor losses on the number of ranks.
SAME_EVERYWHERE = {"use_cpu_initialization": True, "hidden_dropout": 0, "attention_dropout": 0}


def build(tp):
    """A GPT that DDP wraps; Dion for its matrices, AdamW for the rest."""
    config = TransformerConfig(tensor_model_parallel_size=tp, **SIZES, **SAME_EVERYWHERE)
    gpt = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH).cuda()
    tag_matrices([gpt])  # before DDP lays out its buffers
    ddp = distributed.DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = distributed.DistributedDataParallel(config, ddp, gpt)
    config = OptimizerConfig(lr=LR, weight_decay=WEIGHT_DECAY, use_distributed_optimizer=True)
    dion = DionConfig(rank_fraction=0.25, seed=SEED)
    return model, get_megatron_dion_optimizer(config, [model], dion)


def batch(iteration):
    """This rank's sequences (samples, LENGTH + 1). They count in steps, which can be learned."""
    draw = torch.Generator().manual_seed(SEED + iteration)
    start, step = torch.randint(1, VOCABULARY, (2, SAMPLES, 1), generator=draw)
    tokens = (start + step * torch.arange(LENGTH + 1)) % VOCABULARY
    group = parallel_state.get_data_parallel_group()
    return tokens.chunk(group.size())[group.rank()].cuda()


def train_step(model, optimizer, iteration):
    """Train on a batch, and return its loss over all ranks and the gradient's norm.

    Microbatches and pipeline stages need megatron.core's get_forward_backward_func in its place.
    """
    for group in optimizer.param_groups:
        group["lr"] = LR * min(1, (iteration + 1) / WARMUP)
        group["weight_decay"] = WEIGHT_DECAY * group["wd_mult"]  # none for biases and norms
    model.zero_grad_buffer()
    optimizer.zero_grad()
    tokens = batch(iteration)
    positions = torch.arange(LENGTH, device=tokens.device).expand(len(tokens), -1)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    loss.backward()
    distributed.finalize_model_grads([model])  # reduces gradients over ranks
    _, grad_norm, _ = optimizer.step()
    torch.distributed.all_reduce(loss.detach_(), group=parallel_state.get_data_parallel_group())
    return loss.item() / parallel_state.get_data_parallel_world_size(), grad_norm


def checkpoint(model, optimizer, iteration, is_loading=False):
    """What a checkpoint holds, or should be loaded with: the same on any number of ranks."""
    weights = model.module.sharded_state_dict()
    state = optimizer.sharded_state_dict(weights, is_loading=is_loading)
    return {"model": weights, "optimizer": state, "iteration": iteration}


def load(folder, model, optimizer):
    """Take everything from a checkpoint, and say at which iteration it was saved."""
    saved = dist_checkpointing.load(checkpoint(model, optimizer, 0, is_loading=True), folder)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["iteration"]


def main():
    """Train as the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (%(default)s)")
    parser.add_argument("--iterations", type=int, default=20, help="when to end (%(default)s)")
    parser.add_argument("--load", type=Path, help="checkpoint to go on from (none: begin anew)")
    parser.add_argument("--save", type=Path, help="new folder for a checkpoint (none: not saved)")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun")
    if args.save and args.save.exists():
        parser.error(f"--save {args.save} is there already: name a new folder")

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if ON_GPU else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tp)
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    torch.manual_seed(SEED)

    model, optimizer = build(args.tp)
    say = print if torch.distributed.get_rank() == 0 else lambda line: None
    say(optimizer.routing_table.summary())
    begin = load(args.load, model, optimizer) if args.load else 0
    for iteration in range(begin, args.iterations):
        loss, grad_norm = train_step(model, optimizer, iteration)
        say(f"iteration {iteration + 1}: loss {loss:.6f}, grad norm {grad_norm:.4f}")
    if args.save:
        args.save.mkdir(exist_ok=True, parents=True)
        dist_checkpointing.save(checkpoint(model, optimizer, args.iterations), args.save)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
