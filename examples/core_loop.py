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

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
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
        finalize_model_grads_func=finalize_model_grads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH).cuda()
    tag_matrices([model])  # before DDP lays out its buffers
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return DistributedDataParallel(config, ddp_config, model)


def build_optimizer(model):
    """Dion for the matrices, AdamW for the rest, and the schedule of both."""
    config = OptimizerConfig(
        lr=LR, min_lr=LR / 10, weight_decay=WEIGHT_DECAY, use_distributed_optimizer=True
    )
    dion = DionConfig(rank_fraction=0.25, seed=SEED)
    optimizer = get_megatron_dion_optimizer(config, [model], dion)
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


def batches(iteration):
    """Sequences that count in steps, which the model has to find out; each rank has its share."""
    draw = torch.Generator().manual_seed(SEED + iteration)
    start, step = torch.randint(1, VOCABULARY, (2, SAMPLES, 1), generator=draw)
    tokens = (start + step * torch.arange(LENGTH + 1)) % VOCABULARY  # (SAMPLES, LENGTH + 1)
    group = parallel_state.get_data_parallel_group()
    yield tokens.chunk(group.size())[group.rank()].cuda()  # (SAMPLES / ranks, LENGTH + 1)


def forward_step(data, model):
    """The losses of a batch's tokens, and what makes the loss of them."""
    tokens = next(data)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(LENGTH, device=tokens.device).expand_as(inputs)
    return model(inputs, positions, None, labels=labels), mean_loss


def mean_loss(losses):
    """The mean, once to differentiate and once to report."""
    mean = losses.float().mean()
    return mean, mean.detach().clone()


def train(model, optimizer, scheduler, iterations):
    """Step through iterations and print the loss of each."""
    forward_backward = get_forward_backward_func()
    group = parallel_state.get_data_parallel_group()
    for iteration in iterations:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        [loss] = forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches(iteration),
            model=[model],
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=SAMPLES // group.size(),
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        scheduler.step(increment=1)
        torch.distributed.all_reduce(loss, group=group)
        if torch.distributed.get_rank() == 0:
            mean = loss.item() / group.size()
            print(f"iteration {iteration + 1}: loss {mean:.6f}, grad norm {grad_norm:.4f}")


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
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--iterations", type=int, default=20, help="of the whole run")
    parser.add_argument("--load", type=Path, help="checkpoint to go on from")
    parser.add_argument("--save", type=Path, help="new folder for a checkpoint")
    args = parser.parse_args()

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if ON_GPU else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tp)
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    torch.manual_seed(SEED)

    model = build_model(args.tp)
    optimizer, scheduler = build_optimizer(model)
    if torch.distributed.get_rank() == 0:
        print(optimizer.routing_table.summary())
    begin = load(args.load, model, optimizer, scheduler) if args.load else 0
    train(model, optimizer, scheduler, range(begin, args.iterations))
    if args.save:
        args.save.mkdir(exist_ok=True, parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(checkpoint(model, optimizer, scheduler, args.iterations), args.save)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
