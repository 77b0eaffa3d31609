"""What one rank finds out reaches all ranks, so that none goes on alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_dion.checkpointing.errors import CheckpointError, one_line


def on_first_rank[T](function: Callable[[], T]) -> T:
    """Calls a function on rank 0 and returns its result, which must be small, on all ranks.

    Raises:
        CheckpointError: on all ranks, for any exception of the function.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [function()]
        except Exception as error:  # all other ranks wait for the answer
            is_ours = isinstance(error, CheckpointError)
            line = f"{type(error).__name__}: {one_line(error)}"
            answer = [error if is_ours else CheckpointError(line)]
    dist.broadcast_object_list(answer, src=0)
    [result] = answer
    if isinstance(result, CheckpointError):
        raise result
    return result


def gather[T](values: Sequence[T]) -> list[T]:
    """The values of all ranks, those of rank 0 first, on every rank."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, list(values))
    return [value for values in by_rank for value in values]
