"""What the exchange needs of torch.distributed: calls that yield while they are under way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dion.algorithm import Steps

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Groups:
    """The process groups of a grid; None stands for a group of one.

    Attributes:
        tensor: tensor-parallel ranks.
        data: data-parallel ranks.
        replicas: ranks that hold the same pieces and see other gradients of which the mean counts.
    """

    tensor: ProcessGroup | None = None
    data: ProcessGroup | None = None
    replicas: ProcessGroup | None = None


def all_to_all(
    received: Tensor,
    sent: Tensor,
    receive_sizes: list[int],
    send_sizes: list[int],
    group: ProcessGroup | None,
) -> Steps:
    """Uneven all_to_all of 1-D tensors; sizes are numbers of elements, by peer."""
    work = dist.all_to_all_single(
        received, sent, receive_sizes, send_sizes, group=group, async_op=True
    )
    yield from wait_for(work)


def wait_for(work: dist.Work | None) -> Steps:
    """Yields once, then waits: on a GPU the current stream does, not the host."""
    yield
    assert work is not None
    work.wait()


def give_way(group: ProcessGroup | None) -> Steps:
    """In place of a call in which nobody would send anything: as during one, others can compute."""
    if size_of(group) > 1:
        yield


def size_of(group: ProcessGroup | None) -> int:
    """Number of ranks; None is a group of one."""
    return 1 if group is None else group.size()


def rank_in(group: ProcessGroup | None) -> int:
    """This process's rank in a group."""
    return 0 if group is None else group.rank()


def larger_than_one(*groups: ProcessGroup | None) -> list[ProcessGroup]:
    """The groups in which there is anybody to talk to."""
    return [group for group in groups if group is not None and group.size() > 1]


def like_views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of consecutive parts of a buffer with the shapes of the tensors."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = buffer[: sum(sizes)].split(sizes) if tensors else ()
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
