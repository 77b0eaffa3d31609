"""Leaves the gradients of Dion's matrices unaveraged over instances of the distributed optimizer.

Megatron's DDP reduces gradients within an instance and then over the instances. With compressed
gradient sync the second reduction is Dion's: it averages P and R, which are smaller.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch.distributed import ProcessGroup

from megatron_dion.optimizer.routing import weight_of


def reduce_within_instances(model_chunks: Iterable[DistributedDataParallel]) -> None:
    """From now on DDP does not reduce the gradients of Dion's matrices over instances.

    For their buckets, the instances over which a bucket group reduces become this rank alone
    (MC/distributed/param_and_grad_buffer.py:751).
    """
    alone: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for chunk in model_chunks:
        for name in ("bucket_groups", "expert_parallel_bucket_groups"):
            groups = [part for group in getattr(chunk, name) for part in _parts(group, alone)]
            setattr(chunk, name, groups)
            # What DDP derives from its groups (MC/distributed/distributed_data_parallel.py:309).
            if chunk.ddp_config.overlap_param_gather:
                for before, group in pairwise(groups):
                    group.next_param_gather_bucket_group = before
            for group in groups:
                chunk.param_to_bucket_group.update(dict.fromkeys(group.params, group))


def _parts(
    group: _ParamAndGradBucketGroup, alone: ProcessGroup
) -> Iterator[_ParamAndGradBucketGroup]:
    """A group of Dion's buckets and one of all others: without overlap Megatron makes one."""
    for is_dion in (True, False):
        buckets = [b for b in group.buckets if bool(weight_of(b.params_list[0])) == is_dion]
        if buckets:
            ranks = group.intra_distributed_optimizer_instance_group
            part = _ParamAndGradBucketGroup(buckets, group.ddp_config, ranks, ranks.size())
            instances = group.inter_distributed_optimizer_instance_group
            part.inter_distributed_optimizer_instance_group = alone if is_dion else instances
            part.communication_stream = group.communication_stream
            yield part
