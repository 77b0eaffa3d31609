"""Where Megatron's distributed optimizers put parameters: their layouts of flat buffers.

Line numbers are those of megatron-core 0.19.2 (MC).
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dion.sharding import Placement, Weight
from megatron_dion_tools.plan.models import Parameter

# MC/optimizer/param_layout.py:23, :28
_START_MULTIPLE = 64
_BUCKET_MULTIPLE = 128


def default_bucket_size(data_parallel_size: int, pipeline_stage: int = 0) -> int | None:
    """The bucket size, in elements, of a run with `--overlap-grad-reduce` and no size of its own.

    Without that flag Megatron makes one bucket (None), and in any case in pipeline stages after
    the first and in a stage's model chunks after its first: their communication is not on the
    critical path (MC/distributed/distributed_data_parallel.py:68, :105).

    Args:
        data_parallel_size: data-parallel x context-parallel ranks, those of all
            distributed-optimizer instances together.
        pipeline_stage: the stage.
    """
    return max(40_000_000, 1_000_000 * data_parallel_size) if pipeline_stage == 0 else None


@dataclass(frozen=True)
class Slot[T]:
    """A parameter's place in a buffer.

    Attributes:
        parameter: the parameter.
        numel: its elements.
        start: its first one, counted from the bucket's first.
        bucket_numel: elements of the bucket, which is cut evenly over the ranks.
    """

    parameter: T
    numel: int
    start: int
    bucket_numel: int


@dataclass(frozen=True)
class Buffer[T]:
    """A flat buffer of parameters, and one of their gradients.

    Attributes:
        slots: what is in it, bucket by bucket.
        ranks: over how many ranks each bucket is cut.
        buckets: elements of each, with padding.
    """

    slots: tuple[Slot[T], ...]
    ranks: int
    buckets: tuple[int, ...]

    @property
    def numel(self) -> int:
        return sum(self.buckets)


def stock_buffer(
    parameters: Sequence[Parameter], ranks: int, bucket_size: int | None
) -> Buffer[Parameter]:
    """The buffer of some parameters of one dtype in the distributed optimizer's stock layout.

    As `DistributedOptimizer._compute_per_buffer_param_layout` does without
    `--ddp-pad-buckets-for-high-nccl-busbw` (MC/optimizer/distrib_optimizer.py:506).

    Args:
        parameters: in the order in which Megatron registers them, as `GptShape.stage` gives them.
        ranks: over which a bucket is cut: data-parallel x context-parallel ones of one
            distributed-optimizer instance; for experts, those of the expert-data-parallel group.
        bucket_size: elements at which a bucket is full, None for one bucket.
    """
    return _in_buckets(_items(parameters), ranks, bucket_size)


def plain_buffer(
    parameters: Sequence[Parameter], ranks: int, bucket_size: int | None
) -> Buffer[Parameter]:
    """The buffer of DDP without a distributed optimizer: as `stock_buffer`, without any padding."""
    return _in_buckets(_items(parameters), ranks, bucket_size, is_padded=False)


def _items(parameters: Sequence[Parameter]) -> list[tuple[Parameter, int, bool]]:
    return [(parameter, parameter.numel, parameter.is_shared) for parameter in parameters]


def place(
    weights: Sequence[Weight], data_parallel_size: int, bucket_size: int | None
) -> list[Placement]:
    """Places Dion's weights, which have a buffer to themselves, as `stock_buffer` does.

    Returns:
        In the order in which `DionDistributedOptimizer` lists them, the last weight first.
    """
    items = [(weight, weight.rows * weight.columns, False) for weight in weights]
    buffer = _in_buckets(items, data_parallel_size, bucket_size)
    return [Placement(slot.parameter, slot.start, slot.bucket_numel) for slot in buffer.slots]


def layer_wise_buffer(
    parameters: Sequence[Parameter], ranks: int, bucket_size: int | None
) -> Buffer[Parameter]:
    """The buffer of the layer-wise optimizer, in which every parameter lies on one rank.

    As `LayerWiseDistributedOptimizer._compute_per_buffer_param_layout` does
    (MC/optimizer/layer_wise_optimizer.py:213): the parameters of a bucket go to the ranks with the
    least, the largest first; then all ranks' shares are padded to the largest.
    """
    divisor = math.lcm(_START_MULTIPLE, math.lcm(ranks, _BUCKET_MULTIPLE) // ranks)
    slots: list[Slot[Parameter]] = []
    buckets = []
    for bucket in _layer_wise_buckets(parameters, ranks, bucket_size):
        ends = [(0, rank) for rank in range(ranks)]
        found = []
        for parameter in sorted(bucket, key=lambda p: -p.numel):
            end, rank = heapq.heappop(ends)
            start = _round_up(end, _START_MULTIPLE)
            found.append((parameter, rank, start))
            heapq.heappush(ends, (start + parameter.numel, rank))
        share = _round_up(max(end for end, _ in ends), divisor)
        slots += [Slot(p, p.numel, rank * share + start, ranks * share) for p, rank, start in found]
        buckets.append(ranks * share)
    return Buffer(tuple(slots), ranks, tuple(buckets))


def _layer_wise_buckets(
    parameters: Sequence[Parameter], ranks: int, bucket_size: int | None
) -> Iterator[list[Parameter]]:
    """A bucket goes on until nine tenths of its padded shares are filled, at the best."""
    bucket: list[Parameter] = []
    for parameter in reversed(parameters):
        bucket.append(parameter)
        largest = max(p.numel for p in bucket)
        if bucket_size is not None and sum(p.numel for p in bucket) >= max(
            bucket_size, int(ranks * largest * 0.9)
        ):
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _in_buckets[T](
    items: Sequence[tuple[T, int, bool]],
    ranks: int,
    bucket_size: int | None,
    is_padded: bool = True,
) -> Buffer[T]:
    """Lays out items with their elements; one that is tied has a bucket to itself."""
    of_start, of_bucket = 1, 1
    if is_padded:
        of_start, of_bucket = _START_MULTIPLE, math.lcm(ranks, _BUCKET_MULTIPLE)
    slots, buckets = [], []
    for bucket in _buckets(items, bucket_size, of_start):
        (_, numel), start = bucket[-1]
        buckets.append(_round_up(start + numel, of_bucket))
        slots += [Slot(item, size, first, buckets[-1]) for (item, size), first in bucket]
    return Buffer(tuple(slots), ranks, tuple(buckets))


def _buckets[T](
    items: Sequence[tuple[T, int, bool]], bucket_size: int | None, multiple: int
) -> Iterator[list[tuple[tuple[T, int], int]]]:
    """Fills buckets in the order of the backward pass; each item with its start."""
    bucket: list[tuple[tuple[T, int], int]] = []
    end = 0
    for item, numel, is_tied in reversed(items):
        if is_tied and bucket:
            yield bucket
            bucket, end = [], 0
        # Buckets start at multiples of 128, so aligned within its bucket is aligned.
        start = _round_up(end, multiple)
        bucket.append(((item, numel), start))
        end = start + numel
        if is_tied or (bucket_size is not None and end >= bucket_size):
            yield bucket
            bucket, end = [], 0
    if bucket:
        yield bucket


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
