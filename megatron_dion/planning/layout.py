"""Where Megatron's distributed optimizer puts weights: its stock layout of a flat buffer.

Line numbers are those of megatron-core 0.19.2 (MC).
"""

import math
from collections.abc import Iterator, Sequence

from megatron_dion.sharding import Placement, Weight

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


def place(
    weights: Sequence[Weight], data_parallel_size: int, bucket_size: int | None
) -> list[Placement]:
    """Lays out the buffer of one model chunk, which Dion's matrices have to themselves.

    As `DistributedOptimizer._compute_per_buffer_param_layout` does for weights of one dtype, no
    shared embedding among them, without `--ddp-pad-buckets-for-high-nccl-busbw`
    (MC/optimizer/distrib_optimizer.py:506).

    Args:
        weights: in the order in which Megatron registers them, as `GptShape.weights` gives them.
        data_parallel_size: ranks over which a bucket is cut: data-parallel x context-parallel ones
            of one distributed-optimizer instance.
        bucket_size: elements at which a bucket is full, None for one bucket.

    Returns:
        In the order in which `DionDistributedOptimizer` lists them, the last weight first.
    """
    multiple = math.lcm(data_parallel_size, _BUCKET_MULTIPLE)
    placements = []
    for bucket in _buckets(weights, bucket_size):
        numel = _round_up(_end(*bucket[-1]), multiple)
        placements += [Placement(weight, start, numel) for weight, start in bucket]
    return placements


def _buckets(
    weights: Sequence[Weight], bucket_size: int | None
) -> Iterator[list[tuple[Weight, int]]]:
    """Fills buckets in the order of the backward pass; each weight with its start."""
    bucket: list[tuple[Weight, int]] = []
    for weight in reversed(weights):
        # Buckets start at multiples of 128, so aligned within its bucket is aligned.
        start = _round_up(_end(*bucket[-1]), _START_MULTIPLE) if bucket else 0
        bucket.append((weight, start))
        if bucket_size is not None and _end(weight, start) >= bucket_size:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _end(weight: Weight, start: int) -> int:
    return start + weight.rows * weight.columns


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
