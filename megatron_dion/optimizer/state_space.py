"""Where the elements that a rank holds of a parameter lie in the tensors of a checkpoint.

A distributed optimizer holds some contiguous elements of each flattened parameter. A checkpoint
holds whole tensors: Dion's logical matrices, or the tensors of Megatron's model. The elements are a
few boxes in either, each contiguous in memory, so they are written as they lie, and a rank of any
topology reads those that it holds.
"""

from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_dion.optimizer.record import DION_PREFIX, PREFIX, WEIGHT
from megatron_dion.optimizer.routing import tensor_parallel_rank
from megatron_dion.sharding import Weight, boxes, rectangles

MASTER = "param"  # Megatron's name for master weights (MC/optimizer/distrib_optimizer.py:1113)


def flat_states(optimizer: DistributedOptimizer) -> Iterator[tuple[Parameter, int, str, Tensor]]:
    """All that a rank's distributed optimizer holds.

    Yields:
        A parameter of the model, the first element of the flattened parameter that the rank holds,
        the kind of state (`param` for the master weight), and the 1-D state of those elements.
    """
    buckets = (
        b for ranges in optimizer.gbuf_ranges for of_type in ranges.values() for b in of_type
    )
    for bucket in buckets:
        for parameter, place in bucket["param_map"].items():
            states = optimizer._get_main_param_and_optimizer_states(parameter)
            for kind, state in states.items():
                if state.dim() == 1:
                    yield parameter, place["param"].start, kind, state


def sharded_states(
    optimizer: DistributedOptimizer,
    kinds: Collection[str] | None,
    weights: Mapping[Parameter, Weight],
    model_state: dict[str, Any],
) -> Iterator[ShardedTensor]:
    """The state of a distributed optimizer, as views with their places in a checkpoint.

    Args:
        optimizer: the optimizer; the first instance's copy is saved.
        kinds: of state; None for all.
        weights: the parameters that lie in the checkpoint as logical matrices.
        model_state: sharded state of the model, which tells where all others lie.
    """
    bases, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {id(base.data): base for base in nested_values(bases)}
    instance = optimizer.distributed_optimizer_instance_id
    for parameter, start, kind, flat in flat_states(optimizer):
        if kinds is not None and kind not in kinds:
            continue
        if parameter in weights:
            rank = tensor_parallel_rank(parameter)
            yield from _in_matrices(weights[parameter], rank, start, kind, flat, instance)
        else:
            yield from _in_model(by_parameter[id(parameter)], start, kind, flat, instance)


def _in_matrices(
    weight: Weight, rank: int, start: int, kind: str, flat: Tensor, instance: int
) -> Iterator[ShardedTensor]:
    shapes = weight.shapes()
    copy = rank if weight.partition_dim is None else 0  # all tensor-parallel ranks have it
    for box in rectangles(weight, rank, start, start + flat.numel()):
        name, rows, columns = shapes[box.part]
        yield box_of_tensor(
            f"{DION_PREFIX}.{WEIGHT if kind == MASTER else kind}.{name}",
            flat[box.offset : box.offset + box.numel].view(box.rows, box.columns),
            (rows, columns),
            (box.row_start, box.column_start),
            (instance, copy),
        )


def _in_model(
    base: ShardedTensor | ShardedTensorFactory, start: int, kind: str, flat: Tensor, instance: int
) -> Iterator[ShardedTensor]:
    for first, part in _tensors_of(base):
        low = max(start - first, 0)
        high = min(start + flat.numel() - first, prod(part.local_shape))
        for offset, shape, where in boxes(part.local_shape, low, high):
            at = first + offset - start
            corner = (0,) * part.prepend_axis_num + where
            yield box_of_tensor(
                f"{PREFIX}.{kind}.{part.key}",
                flat[at : at + prod(shape)].view((1,) * part.prepend_axis_num + shape),
                part.global_shape,
                tuple(a + b for a, b in zip(part.global_offset, corner, strict=True)),
                (instance, *part.replica_id[:2]),
                allow_shape_mismatch=part.allow_shape_mismatch,
            )


def _tensors_of(
    base: ShardedTensor | ShardedTensorFactory,
) -> Iterator[tuple[int, ShardedTensor]]:
    """The tensors that a parameter is in a checkpoint, each with its first element's number.

    Gate and up projection, for example, are two in Megatron's checkpoints.
    """
    if isinstance(base, ShardedTensor):
        yield 0, base
        return
    shape = torch.empty(base.data.shape, device="meta")
    parts = base.build_fn(base.key, shape, base.replica_id, None)
    for part in nested_values(parts if isinstance(parts, dict) else {"parts": parts}):
        if not part.data.is_contiguous():
            raise RuntimeError(f"{part.key} is not made of whole rows of its parameter")
        yield part.data.storage_offset(), part


def box_of_tensor(
    key: str,
    data: Tensor,
    global_shape: tuple[int, ...],
    global_offset: tuple[int, ...],
    replica_id: tuple[int, ...],
    allow_shape_mismatch: bool = False,
) -> ShardedTensor:
    """A box, anywhere in a tensor of a checkpoint."""
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=global_shape,
        global_offset=global_offset,
        axis_fragmentations=None,  # the cuts lie anywhere
        replica_id=replica_id,
        allow_shape_mismatch=allow_shape_mismatch,
    )
