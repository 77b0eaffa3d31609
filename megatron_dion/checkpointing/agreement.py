"""What one rank finds out, all ranks must know: none may go on alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_dion.checkpointing.errors import CheckpointError, told


def on_first_rank[T](function: Callable[[], T]) -> T:
    """Calls a function on rank 0 and returns its result, which must be small, on all ranks.

    Raises:
        CheckpointError: what the function raised, on all ranks, whatever it was.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [function()]
        except CheckpointError as error:
            answer = [error]
        except Exception as error:  # all others wait for the answer
            answer = [CheckpointError(f"{type(error).__name__}: {told(error)}")]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], CheckpointError):
        raise answer[0]
    result: T = answer[0]
    return result


def gathered[T](values: Sequence[T]) -> list[T]:
    """The values of all ranks, rank 0's first."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, list(values))
    return [value for ranks in everywhere for value in ranks]
