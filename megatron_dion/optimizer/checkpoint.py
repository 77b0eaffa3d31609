"""Dion's state as Megatron's distributed checkpoints hold it: in the space of logical matrices.

Every block is a 2-D ShardedTensor with its place in the whole matrix, so saving moves nothing
between ranks, and a block of any other topology can be loaded.
"""

from collections.abc import Sequence

from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_dion.optimizer.binding import HeldBlock

_PREFIX = "optimizer.state.dion"


def sharded_state(blocks: Sequence[HeldBlock], instance: int) -> dict[str, ShardedTensor]:
    """Views of master weights, momenta and right factors, to be saved or loaded into.

    Args:
        blocks: what this rank holds.
        instance: of the distributed optimizer; the first one's copy is saved.
    """
    tensors = {}
    for block in blocks:
        matrix, place, held = block.matrix, block.rectangle, block.tensors
        whole = (matrix.rows, matrix.columns)
        factor = (matrix.rows, matrix.rank)
        corner = (place.row_start, place.column_start)
        copy = (instance, 0 if block.is_first_copy else 1)
        row_copy = (instance, 0 if block.is_first_of_row else 1)
        right_corner = (place.row_start, held.kept_columns.start)
        for kind, data, shape, offset, replica in (
            ("weight", held.weight, whole, corner, copy),
            ("momentum", held.momentum, whole, corner, copy),
            ("right_factor", held.kept_right, factor, right_corner, row_copy),
        ):
            key = f"{_PREFIX}.{kind}.{matrix.name}"
            if data.numel():
                tensors[f"{key}@{corner}"] = _sharded(key, data, shape, offset, replica)
    return tensors


def load_sharded_state(blocks: Sequence[HeldBlock], loaded: dict[str, Tensor]) -> None:
    """Copies what was loaded for `sharded_state` into the blocks."""
    for name, tensor in sharded_state(blocks, instance=0).items():
        assert tensor.data is not None
        tensor.data.copy_(loaded[name])


def _sharded(
    key: str,
    data: Tensor,
    global_shape: tuple[int, ...],
    global_offset: tuple[int, ...],
    replica_id: tuple[int, ...],
) -> ShardedTensor:
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=global_shape,
        global_offset=global_offset,
        axis_fragmentations=None,  # the cuts lie anywhere
        replica_id=replica_id,
    )
