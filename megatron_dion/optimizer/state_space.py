"""Where a rank's flat pieces of parameters lie in the tensors of a checkpoint.

A distributed optimizer holds a contiguous piece of each flattened parameter. A checkpoint holds
whole tensors: Dion's logical matrices, or the tensors of Megatron's model. A piece is a few boxes
in either, each contiguous in memory, so it is written as it lies and any other piece can be read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from megatron_dion.optimizer.keys import DION_PREFIX, MASTER, PREFIX, WEIGHT
from megatron_dion.optimizer.routing import tensor_parallel_rank
from megatron_dion.sharding import Weight, boxes, rectangles

Requests = dict[str, ShardedTensor]


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a parameter.

    Attributes:
        parameter: of the model.
        start: first element of the flattened parameter that the rank holds.
        stop: one past the last.
        tensors: by kind (`param` for the master weight), 1-D, stop - start elements each.
    """

    parameter: Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor]


def pieces(optimizer: DistributedOptimizer) -> Iterator[Piece]:
    """All pieces that a distributed optimizer holds, with their states."""
    if optimizer.is_stub_optimizer:
        return
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, place in bucket["param_map"].items():
                    start, stop = place["param"].start, place["param"].end
                    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                    flat = {kind: tensor for kind, tensor in tensors.items() if tensor.dim() == 1}
                    yield Piece(parameter, start, stop, flat)


class StateSpace:
    """Places pieces of parameters in a checkpoint.

    Args:
        weights: the parameters that lie in the space of logical matrices, and how.
        model_state: sharded state of the model, which tells where all others lie.
        instance: of the distributed optimizer; the first one's copy is saved.
    """

    def __init__(
        self, weights: Mapping[Parameter, Weight], model_state: dict[str, Any], instance: int
    ) -> None:
        self._weights = weights
        self._instance = instance
        bases, _ = extract_sharded_tensors_and_factories(model_state)
        self._bases = {id(base.data): base for base in nested_values(bases)}

    def place(self, piece: Piece, kinds: Sequence[str] | None = None) -> Requests:
        """The tensors of a piece with their places, by names of their own.

        Args:
            piece: what is placed.
            kinds: of its tensors; all by default.
        """
        chosen = piece.tensors if kinds is None else {k: piece.tensors[k] for k in kinds}
        found: Requests = {}
        for kind, flat in chosen.items():
            weight = self._weights.get(piece.parameter)
            placed = (
                self._in_model(piece, kind, flat)
                if weight is None
                else self._in_matrices(weight, piece, kind, flat)
            )
            found |= {f"{tensor.key}@{tensor.global_offset}": tensor for tensor in placed}
        return found

    def _in_matrices(
        self, weight: Weight, piece: Piece, kind: str, flat: Tensor
    ) -> Iterator[ShardedTensor]:
        rank = tensor_parallel_rank(piece.parameter)
        shapes = weight.shapes()
        copy = rank if weight.partition_dim is None else 0  # all tensor-parallel ranks have it
        for box in rectangles(weight, rank, piece.start, piece.stop):
            name, rows, columns = shapes[box.matrix]
            yield box_of_tensor(
                f"{DION_PREFIX}.{WEIGHT if kind == MASTER else kind}.{name}",
                flat[box.offset : box.offset + box.numel].view(box.rows, box.columns),
                (rows, columns),
                (box.row_start, box.column_start),
                (self._instance, copy),
            )

    def _in_model(self, piece: Piece, kind: str, flat: Tensor) -> Iterator[ShardedTensor]:
        base = self._bases[id(piece.parameter)]
        for part in _parts(base):
            # The part is whole rows of the parameter, which are contiguous.
            first = part.data.storage_offset()
            start = max(piece.start, first) - first
            stop = min(piece.stop, first + part.data.numel()) - first
            for offset, shape, where in boxes(part.local_shape, start, stop):
                at = first + offset - piece.start
                prepended = (1,) * part.prepend_axis_num
                corner = (0,) * part.prepend_axis_num + where
                yield box_of_tensor(
                    f"{PREFIX}.{kind}.{part.key}",
                    flat[at : at + prod(shape)].view(prepended + shape),
                    part.global_shape,
                    tuple(a + b for a, b in zip(part.global_offset, corner, strict=True)),
                    (self._instance, *part.replica_id[:2]),
                    allow_shape_mismatch=part.allow_shape_mismatch,
                )


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


def _parts(base: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The tensors that a parameter is in a checkpoint, with data on the meta device.

    Gate and up projection, for example, are two in Megatron's checkpoints.
    """
    shape = torch.empty(base.data.shape, device="meta")
    if isinstance(base, ShardedTensor):
        parts = [base]
        datas = [shape]
    else:
        built = base.build_fn(base.key, shape, base.replica_id, None)
        parts = list(nested_values(built if isinstance(built, dict) else {"parts": built}))
        datas = [part.data for part in parts]
    return [_with_data(part, data) for part, data in zip(parts, datas, strict=True)]


def _with_data(part: ShardedTensor, data: Tensor) -> ShardedTensor:
    if not data.is_contiguous():
        raise RuntimeError(f"{part.key} is not made of whole rows of its parameter")
    with_data = part.without_data()
    with_data.data = data
    return with_data
