"""Keeps the gradients of Dion's matrices apart on each distributed-optimizer instance.

Megatron's DDP reduces gradients within an instance and then over the instances. With compressed
gradient sync the second reduction is Dion's: it averages P and R, which are smaller.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucket,
    _ParamAndGradBucketGroup,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm.count_sketch import count_sketch
from megatron_dion.optimizer.routing import weight_of


def keep_gradients_apart(model_chunks: Iterable[DistributedDataParallel]) -> None:
    """From now on the gradients of Dion's matrices are not reduced over instances.

    A bucket group reduces over the group in its attribute
    `inter_distributed_optimizer_instance_group` (MC/distributed/param_and_grad_buffer.py:751): for
    Dion's it becomes a group of this rank alone.
    """
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for chunk in model_chunks:
        for name in ("bucket_groups", "expert_parallel_bucket_groups"):
            groups = [one for group in getattr(chunk, name) for one in _by_optimizer(group)]
            for group in groups:
                if _is_dion(group.buckets[0]):
                    group.inter_distributed_optimizer_instance_group = alone
            setattr(chunk, name, groups)
            _link(chunk, groups)


def norm_keeping_sketch(
    gradients: list[Tensor], replicas: ProcessGroup, scale: float, seed: int, step: int
) -> Tensor:
    """A vector with nearly the norm of the replicas' mean gradient, the same on all of them.

    Args:
        gradients: of this replica.
        replicas: the ranks that hold the same pieces.
        scale: multiplies gradients before they are averaged.
        seed: of the run.
        step: number of the step; each has a sketch of its own.
    """
    flat = [gradient.flatten().float() for gradient in gradients]
    sketch = count_sketch(flat, seed, f"gradient norm/{step}").to(torch.cuda.current_device())
    dist.all_reduce(sketch, group=replicas)
    return sketch.mul_(scale / replicas.size())


def _is_dion(bucket: _ParamAndGradBucket) -> bool:
    return weight_of(bucket.params_list[0]) is not None


def _by_optimizer(group: _ParamAndGradBucketGroup) -> list[_ParamAndGradBucketGroup]:
    """Splits a group that has buckets of both optimizers, as Megatron's has without overlap."""
    kinds = [
        [bucket for bucket in group.buckets if _is_dion(bucket) == kind] for kind in (True, False)
    ]
    if not all(kinds):
        return [group]
    found = []
    for buckets in kinds:
        own = _ParamAndGradBucketGroup(
            buckets,
            group.ddp_config,
            group.intra_distributed_optimizer_instance_group,
            group.intra_distributed_optimizer_instance_size,
        )
        own.inter_distributed_optimizer_instance_group = (
            group.inter_distributed_optimizer_instance_group
        )
        own.communication_stream = group.communication_stream
        found.append(own)
    return found


def _link(chunk: DistributedDataParallel, groups: list[_ParamAndGradBucketGroup]) -> None:
    """What DDP derives from its groups (MC/distributed/distributed_data_parallel.py:309-339)."""
    for group, following in zip(groups[1:], groups, strict=False):
        if chunk.ddp_config.overlap_param_gather:
            group.next_param_gather_bucket_group = following
    for group in groups:
        for bucket in group.buckets:
            for parameter in bucket.params_list:
                chunk.param_to_bucket_group[parameter] = group
