"""What the exchange needs of torch.distributed: calls that yield while they are under way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm.exchange import Steps
from megatron_dion.sharding.plan import Plan

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# What is averaged over replicas at a time; copies take 4 bytes a number.
_NUMBERS_AT_A_TIME = 1 << 26


@dataclass(frozen=True)
class Groups:
    """The process groups of a grid; None stands for a group of one."""

    tensor: ProcessGroup | None = None
    data: ProcessGroup | None = None
    # Ranks that hold the same pieces and have other gradients, whose mean is the gradient.
    replicas: ProcessGroup | None = None


class Setup(NamedTuple):
    """What an exchange is made of."""

    plan: Plan
    groups: Groups
    replicas: int  # number of ranks in `groups.replicas`, over which P and R are averaged
    wire: torch.dtype  # in which P and R travel
    has_residual: bool  # whether weights move along the residual, too


def all_to_all(
    received: Tensor,
    sent: Tensor,
    receive_sizes: list[int],
    send_sizes: list[int],
    group: ProcessGroup | None,
) -> Steps:
    """Uneven all_to_all of 1-D tensors; sizes are numbers of elements, by peer."""
    yield from _wait_for(
        dist.all_to_all_single(
            received, sent, receive_sizes, send_sizes, group=group, async_op=True
        )
    )


def all_reduce(tensor: Tensor, group: ProcessGroup | None) -> Steps:
    """Sums a tensor over a group, in place."""
    if size_of(group) > 1:
        yield from _wait_for(dist.all_reduce(tensor, group=group, async_op=True))


def reduce_scatter(part: Tensor, tensor: Tensor, group: ProcessGroup | None) -> Steps:
    """Sums a 1-D tensor over a group; each rank gets an equal part of the sum."""
    yield from _wait_for(dist.reduce_scatter_tensor(part, tensor, group=group, async_op=True))


def all_gather(gathered: Tensor, tensor: Tensor, group: ProcessGroup | None) -> Steps:
    """Concatenates the 1-D tensors of a group's ranks."""
    yield from _wait_for(dist.all_gather_into_tensor(gathered, tensor, group=group, async_op=True))


def _wait_for(work: dist.Work | None) -> Steps:
    """Yields once, then waits: on a GPU the current stream does, not the host."""
    yield
    assert work is not None
    work.wait()


def size_of(group: ProcessGroup | None) -> int:
    """Number of ranks; None is a group of one."""
    return 1 if group is None else group.size()


def rank_in(group: ProcessGroup | None) -> int:
    """This process's rank in a group."""
    return 0 if group is None else group.rank()


def ring_bytes(nbytes: int, ranks: int) -> int:
    """What a rank sends in an all_reduce of so many bytes by a ring."""
    return 2 * nbytes * (ranks - 1) // ranks


def average(tensors: Sequence[Tensor], replicas: ProcessGroup | None) -> None:
    """Replaces tensors by their means over replicas. A collective call."""
    if size_of(replicas) == 1:
        return
    for tensor in tensors:
        for part in tensor.view(-1).split(_NUMBERS_AT_A_TIME):
            sent = part.float()
            dist.all_reduce(sent, group=replicas)
            part.copy_(sent / size_of(replicas))
