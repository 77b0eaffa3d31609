"""A training loop on megatron.core alone, with Dion: nothing of megatron.training.

torchrun --nproc-per-node 4 examples/core_loop.py --tp 2 --iterations 40 --save checkpoint
torchrun --nproc-per-node 2 examples/core_loop.py --iterations 80 --load checkpoint

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
    cpu.install_megatron_patches()

from megatron.core import dist_checkpointing, distributed, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from megatron_dion import DionConfig
from megatron_dion.optimizer.factory import get_megatron_dion_optimizer
from megatron_dion.optimizer.routing import tag_matrices

VOCABULARY, LENGTH, SAMPLES, SEED = 128, 32, 16, 1234  # samples of all ranks in an iteration
LR, WEIGHT_DECAY, WARMUP, DECAY = 4e-3, 0.1, 10, 200  # warmup and decay in iterations


def build_model(tp):
    """A GPT with its matrices marked for Dion, wrapped by DDP."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,  # weights then do not depend on the tensor-parallel size
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH).cuda()
    tag_matrices([model])  # before DDP lays out its buffers
    ddp = distributed.DistributedDataParallelConfig(use_distributed_optimizer=True)
    return distributed.DistributedDataParallel(config, ddp, model)


def build_optimizer(model):
    """Dion for the matrices, AdamW for the rest, and the schedule of both."""
    config = OptimizerConfig(
        lr=LR, min_lr=LR / 10, weight_decay=WEIGHT_DECAY, use_distributed_optimizer=True
    )
    dion = DionConfig(rank_fraction=0.25, seed=SEED)
    optimizer = get_megatron_dion_optimizer(config, [model], dion)
    # It also sets the weight decay of each group: none for biases and norms.
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=LR / 10,
        lr_warmup_steps=WARMUP,
        lr_decay_steps=DECAY,
        lr_decay_style="cosine",
        start_wd=WEIGHT_DECAY,
        end_wd=WEIGHT_DECAY,
        wd_incr_steps=DECAY,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def batch(iteration):
    """This rank's sequences (samples, LENGTH + 1). They count in steps, which can be learned."""
    draw = torch.Generator().manual_seed(SEED + iteration)
    start, step = torch.randint(1, VOCABULARY, (2, SAMPLES, 1), generator=draw)
    tokens = (start + step * torch.arange(LENGTH + 1)) % VOCABULARY
    group = parallel_state.get_data_parallel_group()
    return tokens.chunk(group.size())[group.rank()].cuda()


def train_step(model, optimizer, scheduler, tokens):
    """Train on this rank's sequences, and return the loss of all and the gradient's norm.

    Microbatches and pipeline stages need megatron.core's get_forward_backward_func in its place.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    positions = torch.arange(LENGTH, device=tokens.device).expand(len(tokens), -1)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    loss.backward()
    distributed.finalize_model_grads([model])  # reduces gradients over ranks
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    group = parallel_state.get_data_parallel_group()
    torch.distributed.all_reduce(loss.detach_(), group=group)
    return loss.item() / group.size(), grad_norm


def checkpoint(model, optimizer, scheduler, iteration, is_loading=False):
    """What a checkpoint holds, or should be loaded with: the same on any number of ranks."""
    weights = model.module.sharded_state_dict()
    state = optimizer.sharded_state_dict(weights, is_loading=is_loading)
    schedule = scheduler.state_dict()
    return {"model": weights, "optimizer": state, "schedule": schedule, "iteration": iteration}


def load(folder, model, optimizer, scheduler):
    """Take everything from a checkpoint, and say at which iteration it was saved."""
    wanted = checkpoint(model, optimizer, scheduler, 0, is_loading=True)
    found = dist_checkpointing.load(wanted, folder)
    model.module.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    scheduler.load_state_dict(found["schedule"])
    return found["iteration"]


def main():
    """Train as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (%(default)s)")
    parser.add_argument("--iterations", type=int, default=20, help="when to end (%(default)s)")
    parser.add_argument("--load", type=Path, help="checkpoint to go on from (none: begin anew)")
    parser.add_argument("--save", type=Path, help="new folder for a checkpoint (none: not saved)")
    args = parser.parse_args()

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if ON_GPU else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tp)
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    torch.manual_seed(SEED)

    model = build_model(args.tp)
    optimizer, scheduler = build_optimizer(model)
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        print(optimizer.routing_table.summary())
    begin = load(args.load, model, optimizer, scheduler) if args.load else 0
    for iteration in range(begin, args.iterations):
        loss, grad_norm = train_step(model, optimizer, scheduler, batch(iteration))
        if is_first:
            print(f"iteration {iteration + 1}: loss {loss:.6f}, grad norm {grad_norm:.4f}")
    if args.save:
        args.save.mkdir(exist_ok=True, parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(checkpoint(model, optimizer, scheduler, args.iterations), args.save)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
