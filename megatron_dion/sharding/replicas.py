"""Means over replicas: ranks that hold the same pieces and see other gradients."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.sharding.collectives import size_of

# What is averaged at a time; its copy takes 4 bytes a number.
_NUMBERS_AT_A_TIME = 1 << 26


def average(tensors: Sequence[Tensor], replicas: ProcessGroup | None) -> None:
    """Replaces tensors by their means over replicas. A collective call."""
    if size_of(replicas) == 1:
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for group in in_groups([part for t in flat for part in t.split(_NUMBERS_AT_A_TIME)]):
        sent = torch.cat([part.float() for part in group])
        dist.all_reduce(sent, group=replicas)
        sent /= size_of(replicas)
        parts = sent.split([part.numel() for part in group])
        torch._foreach_copy_(group, list(parts))


def in_groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors together, as long as they have not too many numbers."""
    group: list[Tensor] = []
    numel = 0
    for tensor in tensors:
        if group and numel + tensor.numel() > _NUMBERS_AT_A_TIME:
            yield group
            group, numel = [], 0
        group.append(tensor)
        numel += tensor.numel()
    if group:
        yield group
