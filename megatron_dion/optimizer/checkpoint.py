"""The state of distributed optimizers as tensors of a checkpoint, to be saved or loaded into.

A distributed optimizer holds some contiguous elements of each flattened parameter. A checkpoint
holds whole tensors: Dion's logical matrices, or the tensors of Megatron's model. The elements are a
few boxes in either, each contiguous in memory. So every box is saved as a view of what the
optimizer holds, with its place in a whole tensor: saving moves nothing between ranks, and a rank of
any topology loads the boxes that it holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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

from megatron_dion.optimizer.distributed import DionDistributedOptimizer
from megatron_dion.optimizer.record import DION_PREFIX, MOMENTUM, PREFIX, RIGHT_FACTOR, WEIGHT
from megatron_dion.optimizer.routing import routes_by_rules, tensor_parallel_rank
from megatron_dion.optimizer.rules import RoutingRules
from megatron_dion.sharding import Weight, boxes, rectangles

MASTER = "param"  # Megatron's name for master weights (MC/optimizer/distrib_optimizer.py:1113)


@dataclass(frozen=True)
class Source:
    """What of a checkpoint's optimizer state a run takes. It always takes master weights.

    Attributes:
        rules: by which the checkpoint has logical matrices; None if it has none.
        momentum: whether the run takes Dion's momenta.
        right_factors: whether the run takes Dion's right factors.
        scalars: whether the run takes the state of all other parameters.
    """

    rules: RoutingRules | None
    momentum: bool
    right_factors: bool
    scalars: bool


def count_steps(optimizers: Sequence[DistributedOptimizer]) -> dict[str, int]:
    """Steps that the state of Dion (`dion`) and of the scalar optimizer (`scalar`) has seen.

    A collective call of all ranks: a rank may have neither.
    """
    steps = {"dion": 0, "scalar": 0}
    for optimizer in optimizers:
        if not optimizer.is_stub_optimizer:
            # Optimizers count in each group, and torch's in each state of its own.
            places = [*optimizer.param_groups, *optimizer.optimizer.state.values()]
            kind = "dion" if isinstance(optimizer, DionDistributedOptimizer) else "scalar"
            steps[kind] = max([steps[kind], *(int(place.get("step", 0)) for place in places)])
    everywhere = torch.tensor(list(steps.values()), device=torch.cuda.current_device())
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MAX)
    return dict(zip(steps, everywhere.tolist(), strict=True))


def saved_steps(state_dict: dict[str, Any]) -> dict[str, int]:
    """Those in a checkpoint of Dion's chain, or of an optimizer of Megatron's."""
    if "steps" in state_dict:
        return dict(state_dict["steps"])
    members = [state_dict] if "optimizer" in state_dict else state_dict.values()
    groups = (g for one in members if "optimizer" in one for g in one["optimizer"]["param_groups"])
    return {"dion": 0, "scalar": max((int(group.get("step", 0)) for group in groups), default=0)}


class Transfer:
    """Saves the state of a model's distributed optimizers, or loads it.

    Args:
        optimizers: all of this rank.
        source: what is saved or loaded.
    """

    def __init__(self, optimizers: Sequence[DistributedOptimizer], source: Source) -> None:
        self._optimizers = [one for one in optimizers if not one.is_stub_optimizer]
        self._source = source
        self._tensors: dict[str, ShardedTensor] = {}

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, ShardedTensor]:
        """All tensors, as views, by names of their own, given the model's sharded state."""
        for optimizer in self._optimizers:
            for tensor in self._states_of(optimizer, model_state):
                self._tensors[f"{tensor.key}@{tensor.global_offset}"] = tensor
        return dict(self._tensors)

    @torch.no_grad()
    def take(self, loaded: dict[str, Tensor], steps: dict[str, int]) -> None:
        """Copies what was loaded for `sharded_state` to where it belongs.

        Args:
            loaded: by the names of `sharded_state`.
            steps: that the saved state has seen; state that begins anew has seen none.
        """
        for name, tensor in self._tensors.items():
            tensor.data.copy_(loaded[name])
        for optimizer in self._optimizers:
            if isinstance(optimizer, DionDistributedOptimizer):
                _set_step(optimizer, steps["dion"] if self._source.momentum else 0)
            else:
                _set_step(optimizer, steps["scalar"] if self._source.scalars else 0)
        make_model_weights(self._optimizers)

    def _states_of(
        self, optimizer: DistributedOptimizer, model_state: dict[str, Any]
    ) -> Iterator[ShardedTensor]:
        source, is_dion = self._source, isinstance(optimizer, DionDistributedOptimizer)
        weights = {}  # that lie in the checkpoint as logical matrices
        if source.rules is not None:
            chunks = optimizer.model_chunks
            routes = (r for chunk in chunks for r in routes_by_rules(chunk, source.rules))
            weights = {parameter: route.weight for parameter, route in routes if route.weight}
        bases, _ = extract_sharded_tensors_and_factories(model_state)
        by_parameter = {id(base.data): base for base in nested_values(bases)}
        if not is_dion and source.scalars:
            _allocate_state(optimizer)
        is_taken = source.momentum if is_dion else source.scalars
        instance = optimizer.distributed_optimizer_instance_id  # the first one's copy is saved
        for parameter, start, kind, flat in flat_states(optimizer):
            if kind != MASTER and not (is_taken and (not is_dion or kind == MOMENTUM)):
                continue
            if parameter in weights:
                yield from _in_matrices(weights[parameter], parameter, start, kind, flat, instance)
            else:
                yield from _in_model(by_parameter[id(parameter)], start, kind, flat, instance)
        if isinstance(optimizer, DionDistributedOptimizer) and source.right_factors:
            yield from _right_factors(optimizer)


class MastersOnly:
    """Stands in for an optimizer of Megatron's that loads master weights from a run with Dion.

    Args:
        optimizer: a distributed optimizer, or a chain of them.
        source: the checkpoint.

    Raises:
        ValueError: the optimizer is not distributed, or keeps its master weights elsewhere.
    """

    def __init__(self, optimizer: Any, source: Source) -> None:
        members = getattr(optimizer, "chained_optimizers", [optimizer])
        for member in members:
            if not isinstance(member, DistributedOptimizer):
                raise ValueError("it needs --use-distributed-optimizer")
            if member.config.use_precision_aware_optimizer:
                raise ValueError("it does not go with --use-precision-aware-optimizer")
        self._optimizer = optimizer
        self._transfer = Transfer(members, source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def sharded_state_dict(self, model_state: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The master weights as the checkpoint has them."""
        return {"state": self._transfer.sharded_state(model_state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was loaded."""
        self._transfer.take(state_dict["state"], {"dion": 0, "scalar": 0})


def make_model_weights(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Makes the model's weights from the master weights. A collective call of all ranks.

    A checkpoint of FP8 weights has rounded ones, which an FP8 run would round a second time.
    """
    chunks = {id(chunk): chunk for one in optimizers for chunk in one.model_chunks}.values()
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        # With delayed scaling the magnitude of the rounded values would count for the next scale.
        quantizer = getattr(parameter, "_get_quantizer", lambda: None)()
        amax = getattr(quantizer, "amax", None)
        if amax is not None:
            amax.zero_()
    if any(one.config.reuse_grad_buf_for_mxfp8_param_ag for one in optimizers):
        for chunk in chunks:
            chunk.zero_grad_buffer()  # it is where mxfp8 weights are gathered
    for optimizer in optimizers:
        if optimizer.config.reuse_grad_buf_for_mxfp8_param_ag:
            optimizer._copy_main_params_to_param_buffer()
        else:
            optimizer._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def _allocate_state(optimizer: DistributedOptimizer) -> None:
    """Makes the state that an optimizer would make in its first step."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    if isinstance(inner, torch.optim.Adam):  # without Transformer Engine and apex, on CUDA
        for state in inner.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _set_step(optimizer: DistributedOptimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["step"] = step
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = torch.full_like(state["step"], step)


def flat_states(optimizer: DistributedOptimizer) -> Iterator[tuple[Parameter, int, str, Tensor]]:
    """All that a rank's distributed optimizer holds.

    Yields:
        A parameter of the model, the first element of the flattened parameter that the rank holds,
        the kind of state (`param` for the master weight), and the 1-D state of those elements.
    """
    of_types = (buckets for ranges in optimizer.gbuf_ranges for buckets in ranges.values())
    for bucket in chain.from_iterable(of_types):
        for parameter, place in bucket["param_map"].items():
            states = optimizer._get_main_param_and_optimizer_states(parameter)
            for kind, state in states.items():
                if state.dim() == 1:
                    yield parameter, place["param"].start, kind, state


def _in_matrices(
    weight: Weight, parameter: Parameter, start: int, kind: str, flat: Tensor, instance: int
) -> Iterator[ShardedTensor]:
    rank, shapes = tensor_parallel_rank(parameter), weight.shapes()
    copy = rank if weight.partition_dim is None else 0  # all tensor-parallel ranks have it
    for box in rectangles(weight, rank, start, start + flat.numel()):
        name, rows, columns = shapes[box.matrix]
        yield _box(
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
            yield _box(
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


def _right_factors(optimizer: DionDistributedOptimizer) -> Iterator[ShardedTensor]:
    """What this rank stores of right factors: of rows that several ranks hold, some columns."""
    for matrix, rectangle, columns, values, is_first_of_row in optimizer.right_factors():
        if values.numel():
            yield _box(
                f"{DION_PREFIX}.{RIGHT_FACTOR}.{matrix.name}",
                values,
                (matrix.rows, matrix.rank),
                (rectangle.row_start, columns.start),
                (optimizer.distributed_optimizer_instance_id, 0 if is_first_of_row else 1),
            )


def _box(
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
