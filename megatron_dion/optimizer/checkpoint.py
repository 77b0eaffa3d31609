"""The state of distributed optimizers as tensors of a checkpoint, to be saved or loaded into.

A distributed optimizer holds some contiguous elements of each flattened parameter. A checkpoint
holds whole tensors: Dion's logical matrices, or the tensors of Megatron's model. The elements are a
few boxes in either, each contiguous in memory. So every box is saved as a view of what the
optimizer holds, with its place in a whole tensor: saving moves nothing between ranks, and a rank of
any topology loads the boxes that it holds.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_dion.checkpointing.agreement import gather
from megatron_dion.optimizer.distributed import DionDistributedOptimizer
from megatron_dion.optimizer.record import DION_PREFIX, MOMENTUM, PREFIX, RIGHT_FACTOR, WEIGHT
from megatron_dion.optimizer.routing import routes_by_rules, tensor_parallel_group
from megatron_dion.optimizer.rules import RoutingRules
from megatron_dion.sharding.blocks import boxes, rectangles
from megatron_dion.sharding.matrices import Weight

Shape = tuple[int, ...]

MASTER = "param"  # Megatron's name for master weights (MC/optimizer/distrib_optimizer.py:1113)
MODEL_ONLY = "--no-load-optim or --finetune takes the model's weights only"

# State of Megatron's optimizers, and how those that are not distributed call it.
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
_KINDS = {"fp32_param": MASTER, "momentum_buffer": MOMENTUM}


class Source(NamedTuple):
    """Which optimizer state of a checkpoint a run loads, beside the master weights."""

    rules: RoutingRules | None  # by which the checkpoint has logical matrices; None if it has none
    momentum: float = 1.0  # what it is multiplied by
    right_factors: bool = True
    scalars: bool = True  # the state of the parameters that Dion does not update
    keys: Mapping[str, str] | None = None  # of Megatron's optimizers, where they differ from ours
    dtype: torch.dtype | None = None  # to which the checkpoint's model was rounded; None: unknown


def megatron_keys(dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    """The keys of a checkpoint of Megatron's optimizers by those that its distributed one has.

    Args:
        dtypes: of all tensors of the checkpoint. Weights in float32 are their own master weights.
    """
    states = {key: match for key in dtypes if (match := _STATE.fullmatch(key))}
    models = (key for key, dtype in dtypes.items() if dtype == torch.float32 and key not in states)
    keys = {f"{PREFIX}.{MASTER}.{key}": key for key in models}
    return keys | {f"{PREFIX}.{_KINDS.get(m[1], m[1])}.{m[2]}": key for key, m in states.items()}


class Loading:
    """Stands in for an optimizer, or a chain of them, while it loads what a source names.

    Raises:
        ValueError: the optimizer is not distributed, or keeps its master weights elsewhere.
    """

    def __init__(self, optimizer: Any, source: Source) -> None:
        self._optimizer, self._source = optimizer, source
        self.lacks_scalars = False  # the checkpoint has not all state of scalar parameters: no use
        members = getattr(optimizer, "chained_optimizers", [optimizer])
        if not all(isinstance(member, DistributedOptimizer) for member in members):
            raise ValueError("it needs --use-distributed-optimizer")
        if optimizer.config.use_precision_aware_optimizer:
            raise ValueError("it does not go with --use-precision-aware-optimizer")
        self._members = [member for member in members if not member.is_stub_optimizer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def sharded_state_dict(self, model_state: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The tensors that the source names, as the checkpoint has them."""
        self._tensors = sharded_state(self._members, self._source, model_state)
        if (keys := self._source.keys) is None:
            return {"state": dict(self._tensors)}
        lacking = {t.key for t in self._tensors.values() if t.key not in keys}
        kinds = {key.split(".")[2] for key in gather(sorted(lacking))}
        if MASTER in kinds:
            raise RuntimeError(
                "its master weights are for one topology: save it again with"
                f" --dist-ckpt-optim-fully-reshardable; {MODEL_ONLY}"
            )
        if not kinds <= {MOMENTUM} and self._source.scalars:
            self._source, self.lacks_scalars = self._source._replace(scalars=False), True
            return self.sharded_state_dict(model_state)
        # Megatron cannot load a tensor twice, for the model and for a master weight in parts.
        of_model = {key for key, saved in keys.items() if key == f"{PREFIX}.{MASTER}.{saved}"}
        if self._optimizer.config.params_dtype != torch.float32 and gather(sorted(of_model)):
            raise RuntimeError(
                "its master weights are the weights of a model in float32, as this run's have to"
                " be: leave out --bf16 and --fp16"
            )
        lacking |= of_model
        self._tensors = {n: t for n, t in self._tensors.items() if t.key not in lacking}
        # Not into the master weights: in float32 they are the model's weights.
        is_master = f".{MASTER}."
        beside = (
            (name, one, one.data.clone() if is_master in one.key else one.data)
            for name, one in self._tensors.items()
        )
        return {"state": {n: replace(t, key=keys[t.key], data=data) for n, t, data in beside}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies what was loaded to where it belongs; state that begins anew has seen no step.

        The model's weights are those of the checkpoint already.

        Raises:
            RuntimeError: on all ranks; master weights of another optimizer are not of this model.
        """
        saved = self._source.dtype
        weights = [] if saved is None else list(self._weights())
        for name, tensor in self._tensors.items():
            tensor.data.copy_(state_dict["state"][name])
            if f".{MOMENTUM}." in tensor.key:
                tensor.data.mul_(self._source.momentum)
        differing = [p for p, w, master in weights if saved and not is_rounded(master, w, saved)]
        if names := gather([self._name_of(parameter) for parameter in differing]):
            raise RuntimeError(
                "master weights in it are not the weights of the model beside them:"
                f" {', '.join([*dict.fromkeys(names)][:3])}; {MODEL_ONLY}"
            )
        steps = saved_steps(state_dict)
        steps["dion"] *= bool(self._source.momentum)
        steps["scalar"] *= self._source.scalars
        for member in self._members:
            is_dion = isinstance(member, DionDistributedOptimizer)
            _set_step(member, steps["dion" if is_dion else "scalar"])
        self._optimizer.steps = steps  # where Dion's chain counts them
        scaler = self._members[0].grad_scaler
        if scaler and "grad_scaler" in state_dict:
            scaler.load_state_dict(state_dict["grad_scaler"])
        _make_model_weights(self._members)

    def _weights(self) -> Iterator[tuple[Parameter, Tensor, Tensor]]:
        """Of each parameter, what the model has of this rank's piece of the master weight, too."""
        for member in self._members:
            for parameter, start, kind, flat in flat_states(member):
                # Those in FP8 are rounded by scales that the piece does not tell.
                if kind == MASTER and not is_float8tensor(parameter):
                    piece = parameter.detach().view(-1)[start : start + flat.numel()]
                    yield parameter, piece.clone(), flat

    def _name_of(self, parameter: Parameter) -> str:
        chunks = chain.from_iterable(member.model_chunks for member in self._members)
        routes = chain.from_iterable(routes_by_rules(chunk, RoutingRules()) for chunk in chunks)
        return next(route.parameter for one, route in routes if one is parameter)


def is_rounded(master: Tensor, weight: Tensor, saved: torch.dtype) -> bool:
    """Whether a weight is a master weight, rounded to the type in the checkpoint and to its own.

    To the nearest number of each type, which one of a tie is open; float32 rounds nothing.
    """
    types = [torch.finfo(dtype) for dtype in {saved, weight.dtype} - {torch.float32}]
    relative = prod(1 + one.eps / 2 for one in types) - 1
    absolute = sum(one.smallest_normal * one.eps / 2 for one in types)
    return torch.allclose(weight.float(), master.float(), rtol=relative, atol=absolute)


def saved_steps(state_dict: dict[str, Any]) -> dict[str, int]:
    """Steps that saved state of Dion's chain, or of an optimizer of Megatron's, has seen."""
    if "steps" in state_dict:
        return dict(state_dict["steps"])
    members = [state_dict] if "optimizer" in state_dict else state_dict.values()
    groups = (g for one in members if "optimizer" in one for g in one["optimizer"]["param_groups"])
    return {"dion": 0, "scalar": max((int(group.get("step", 0)) for group in groups), default=0)}


def sharded_state(
    optimizers: Sequence[DistributedOptimizer], source: Source, model_state: dict[str, Any]
) -> dict[str, ShardedTensor]:
    """All tensors that a source names, as views of what the optimizers hold, by unique names.

    The tensors of `model_state`, the model's sharded state, are its parameters.
    """
    bases, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {id(base.data): base for base in nested_values(bases)}
    states = (_states_of(one, source, by_parameter) for one in optimizers)
    return {f"{one.key}@{one.global_offset}": one for one in chain.from_iterable(states)}


def flat_states(optimizer: DistributedOptimizer) -> Iterator[tuple[Parameter, int, str, Tensor]]:
    """All state that a rank's distributed optimizer holds.

    Yields:
        A parameter of the model, the first of its flattened elements that the rank holds, the kind
        of state (`param` for the master weight), and the 1-D state of the elements.
    """
    for parameter in optimizer.model_param_gbuf_map:
        start = optimizer._get_model_param_range_map(parameter)["param"].start
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        yield from ((parameter, start, k, state) for k, state in states.items() if state.dim() == 1)


def _states_of(
    optimizer: DistributedOptimizer, source: Source, by_parameter: dict[int, Any]
) -> Iterator[ShardedTensor]:
    weights = {}  # that lie in the checkpoint as logical matrices
    if source.rules is not None:
        routes = (routes_by_rules(chunk, source.rules) for chunk in optimizer.model_chunks)
        weights = {p: r.weight for p, r in chain.from_iterable(routes) if r.weight is not None}
    kinds = {MASTER}
    if not isinstance(optimizer, DionDistributedOptimizer):
        if source.scalars:
            _allocate_state(optimizer)
            kinds.update(*optimizer.optimizer.state.values())
    else:
        kinds |= {MOMENTUM} if source.momentum else set()
        yield from _right_factors(optimizer) if source.right_factors else ()
    instance = optimizer.distributed_optimizer_instance_id  # the first one's copy is saved
    for parameter, start, kind, flat in flat_states(optimizer):
        if kind not in kinds:
            continue
        if parameter in weights:
            yield from _in_matrices(weights[parameter], parameter, start, kind, flat, instance)
        else:
            yield from _in_model(by_parameter[id(parameter)], start, kind, flat, instance)


def _in_matrices(
    weight: Weight, parameter: Parameter, start: int, kind: str, flat: Tensor, instance: int
) -> Iterator[ShardedTensor]:
    rank, shapes = tensor_parallel_group(parameter).rank(), weight.shapes()
    copy = rank if weight.partition_dim is None else 0  # all tensor-parallel ranks have it
    for box in rectangles(weight, rank, start, start + flat.numel()):
        name, *shape = shapes[box.matrix]
        values = flat[box.offset : box.offset + box.numel].view(box.rows, box.columns)
        key = f"{DION_PREFIX}.{WEIGHT if kind == MASTER else kind}.{name}"
        yield _box(key, values, tuple(shape), (box.row_start, box.column_start), (instance, copy))


def _in_model(
    base: ShardedTensor | ShardedTensorFactory, start: int, kind: str, flat: Tensor, instance: int
) -> Iterator[ShardedTensor]:
    for first, part in _tensors_of(base):
        low = max(start - first, 0)
        high = min(start + flat.numel() - first, prod(part.local_shape))
        for offset, shape, where in boxes(part.local_shape, low, high):
            at = first + offset - start
            values = flat[at : at + prod(shape)].view((1,) * part.prepend_axis_num + shape)
            where = (0,) * part.prepend_axis_num + where
            yield _box(
                f"{PREFIX}.{kind}.{part.key}",
                values,
                part.global_shape,
                tuple(a + b for a, b in zip(part.global_offset, where, strict=True)),
                (instance, *part.replica_id[:2]),
                allow_shape_mismatch=part.allow_shape_mismatch,
            )


def _tensors_of(
    base: ShardedTensor | ShardedTensorFactory,
) -> Iterator[tuple[int, ShardedTensor]]:
    """The tensors of a parameter in a checkpoint, each with the number of its first element.

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
    """What this rank stores of Q: some columns where tensor-parallel ranks share the rows."""
    instance = optimizer.distributed_optimizer_instance_id
    rows = optimizer.optimizer.bind().right_factors()
    for matrix, rectangle, columns, values, is_first_of_row in rows:
        if values.numel():
            key = f"{DION_PREFIX}.{RIGHT_FACTOR}.{matrix.name}"
            corner = (rectangle.row_start, columns.start)
            replica = (instance, 0 if is_first_of_row else 1)
            yield _box(key, values, (matrix.rows, matrix.rank), corner, replica)


def _box(
    key: str, values: Tensor, whole: Shape, corner: Shape, replica: Shape, **options: Any
) -> ShardedTensor:
    """A box anywhere in a tensor of a checkpoint, which no grid divides."""
    shape = tuple(values.shape)
    return ShardedTensor(key, values, values.dtype, shape, whole, corner, None, replica, **options)


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


def _make_model_weights(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Makes the model's weights from the master weights. A collective call of all ranks.

    A checkpoint of FP8 weights has rounded ones, which an FP8 run would round a second time.
    """
    chunks = {id(chunk): chunk for one in optimizers for chunk in one.model_chunks}.values()
    reuses_gradients = any(one.config.reuse_grad_buf_for_mxfp8_param_ag for one in optimizers)
    for chunk in chunks:
        for parameter in chunk.parameters():
            # With delayed scaling the size of the rounded values would count for the next scale.
            quantizer = getattr(parameter, "_get_quantizer", lambda: None)()
            if (amax := getattr(quantizer, "amax", None)) is not None:
                amax.zero_()
        if reuses_gradients:
            chunk.zero_grad_buffer()  # it is where mxfp8 weights are gathered
    for optimizer in optimizers:
        if reuses_gradients:
            optimizer._copy_main_params_to_param_buffer()
        else:
            optimizer._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)
