"""The state of distributed optimizers as tensors of a checkpoint, to be saved or loaded into.

Every tensor is a view of what the optimizer holds, with its place in a whole tensor: saving moves
nothing between ranks, and loading reads what the new topology needs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_dion.optimizer.binding import RightRows
from megatron_dion.optimizer.distributed import DionDistributedOptimizer
from megatron_dion.optimizer.keys import DION_PREFIX, MASTER, MOMENTUM, RIGHT_FACTOR
from megatron_dion.optimizer.routing import weights_by_rules
from megatron_dion.optimizer.rules import RoutingRules
from megatron_dion.optimizer.state_space import Requests, StateSpace, box_of_tensor, pieces


@dataclass(frozen=True)
class Source:
    """What of a checkpoint's optimizer state is there and wanted. Master weights always are.

    Attributes:
        rules: by which the checkpoint keeps matrices as Dion's; None if it has none of Dion's.
        momentum: whether Dion's momenta are taken.
        right_factors: whether Dion's right factors are taken.
        scalars: whether the state of all other parameters is taken.
    """

    rules: RoutingRules | None
    momentum: bool
    right_factors: bool
    scalars: bool


@dataclass(frozen=True)
class Steps:
    """Number of steps that the state of Dion, and that of the scalar optimizer, has seen."""

    dion: int
    scalar: int

    @classmethod
    def of(cls, optimizers: Sequence[DistributedOptimizer]) -> "Steps":
        """Those of a chain; a rank may have neither. A collective call of all ranks."""
        found = [0, 0]
        for optimizer in optimizers:
            is_scalar = not isinstance(optimizer, DionDistributedOptimizer)
            found[is_scalar] = max(found[is_scalar], _step_of(optimizer))
        everywhere = torch.tensor(found, device=torch.cuda.current_device())
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MAX)
        return cls(*everywhere.tolist())

    @classmethod
    def saved(cls, state_dict: dict[str, Any]) -> "Steps":
        """Those in a checkpoint of Dion's chain, or of an optimizer of Megatron's."""
        if "steps" in state_dict:
            return cls(**state_dict["steps"])
        members = [state_dict] if "optimizer" in state_dict else list(state_dict.values())
        steps = [
            group.get("step", 0)
            for member in members
            if "optimizer" in member
            for group in member["optimizer"]["param_groups"]
        ]
        return cls(dion=0, scalar=int(max(steps, default=0)))


class Transfer:
    """Names what distributed optimizers hold by its places in a checkpoint.

    Args:
        optimizers: all of a model's, of this rank.
        source: what is saved or loaded.
    """

    def __init__(self, optimizers: Sequence[DistributedOptimizer], source: Source) -> None:
        self._optimizers = [one for one in optimizers if not one.is_stub_optimizer]
        self._source = source
        self._requested: dict[str, Tensor] = {}

    def requests(self, model_state: dict[str, Any]) -> Requests:
        """All tensors, as views; they are kept for `take`.

        Args:
            model_state: sharded state of the model.
        """
        found: Requests = {}
        for optimizer in self._optimizers:
            found |= self._requests_of(optimizer, model_state)
        self._requested = {name: _data(tensor) for name, tensor in found.items()}
        return found

    @torch.no_grad()
    def take(self, loaded: dict[str, Tensor], steps: Steps) -> None:
        """Copies what was loaded for `requests` to where it belongs.

        Args:
            loaded: by the names of the requests.
            steps: that the saved state has seen; state that begins anew has seen none.
        """
        for name, tensor in self._requested.items():
            tensor.copy_(loaded[name])
        for optimizer in self._optimizers:
            if isinstance(optimizer, DionDistributedOptimizer):
                _set_step(optimizer, steps.dion if self._source.momentum else 0)
            else:
                _set_step(optimizer, steps.scalar if self._source.scalars else 0)
        make_model_weights(self._optimizers)

    def _requests_of(
        self, optimizer: DistributedOptimizer, model_state: dict[str, Any]
    ) -> Requests:
        source, is_dion = self._source, isinstance(optimizer, DionDistributedOptimizer)
        kinds: list[str] | None = [MASTER]
        if is_dion and source.momentum:
            kinds = [MASTER, MOMENTUM]
        if not is_dion and source.scalars:
            _allocate(optimizer)
            kinds = None
        rules, chunks = source.rules, optimizer.model_chunks
        weights = {} if rules is None else weights_by_rules(chunks, rules)
        instance = optimizer.distributed_optimizer_instance_id
        space = StateSpace(weights, model_state, instance)
        found: Requests = {}
        for piece in pieces(optimizer):
            found |= space.place(piece, kinds)
        if is_dion and source.right_factors:
            found |= _right_factors(optimizer.right_factors(), instance)
        return found


def make_model_weights(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Makes what the model computes with from the master weights. A collective call of all ranks.

    A checkpoint of FP8 weights has their rounded values: a run with bf16 weights would begin with
    these, and one with FP8 weights would round them again, with other scales.
    """
    chunks = {id(chunk): chunk for one in optimizers for chunk in one.model_chunks}.values()
    if any(one.config.reuse_grad_buf_for_mxfp8_param_ag for one in optimizers):
        for chunk in chunks:
            chunk.zero_grad_buffer()  # it is where mxfp8 weights are gathered
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        _forget_amax(parameter)
    for optimizer in optimizers:
        if optimizer.config.reuse_grad_buf_for_mxfp8_param_ag:
            optimizer._copy_main_params_to_param_buffer()
        else:
            optimizer._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def _forget_amax(parameter: Parameter) -> None:
    """Of a weight with delayed scaling, the magnitude of the rounded values that were loaded.

    It may be larger than that of the masters, and would count for the next scale.
    """
    quantizer = getattr(parameter, "_get_quantizer", lambda: None)()
    amax = getattr(quantizer, "amax", None)
    if amax is not None:
        amax.zero_()


class MastersOnly:
    """Stands in for an optimizer of Megatron's while a checkpoint of Dion's is loaded.

    Takes the master weights; all other state begins anew.

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
        return {"state": self._transfer.requests(model_state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was loaded."""
        self._transfer.take(state_dict["state"], Steps(0, 0))


def _right_factors(stored: Iterable[RightRows], instance: int) -> Requests:
    """What this rank stores of right factors: of shared rows, some of the columns."""
    requests: Requests = {}
    for matrix, rectangle, columns, values, is_first_of_row in stored:
        if values.numel():
            tensor = box_of_tensor(
                f"{DION_PREFIX}.{RIGHT_FACTOR}.{matrix.name}",
                values,
                (matrix.rows, matrix.rank),
                (rectangle.row_start, columns.start),
                (instance, 0 if is_first_of_row else 1),
            )
            corner = (rectangle.row_start, rectangle.column_start)
            requests[f"{tensor.key}@{corner}"] = tensor
    return requests


def _allocate(optimizer: DistributedOptimizer) -> None:
    """Makes the state that an optimizer would make in its first step."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    if isinstance(inner, torch.optim.Adam):  # without Transformer Engine and apex, on CUDA
        for state in inner.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _step_of(optimizer: DistributedOptimizer) -> int:
    """Where optimizers count steps: in each group, and torch's in each state of its own."""
    if optimizer.is_stub_optimizer:
        return 0
    in_states = (state.get("step", 0) for state in optimizer.optimizer.state.values())
    in_groups = (group.get("step", 0) for group in optimizer.param_groups)
    return max((int(step) for steps in (in_states, in_groups) for step in steps), default=0)


def _set_step(optimizer: DistributedOptimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["step"] = step
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = torch.full_like(state["step"], step)


def _data(tensor: ShardedTensor) -> Tensor:
    assert tensor.data is not None
    return tensor.data
