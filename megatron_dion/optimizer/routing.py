"""Which optimizer updates a parameter: one decision, made from names and global shapes.

The decision depends on nothing that a topology changes. It is written on the parameters before
Megatron's DDP lays out its buffers, because Dion's matrices get buffers of their own.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    get_ep_layer_offset,
    get_global_unique_param_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Parameter

from megatron_dion.algorithm import DionConfig, Matrix
from megatron_dion.optimizer.fused import row_pattern
from megatron_dion.optimizer.rules import RoutingRules, in_order_of_layers, without_numbers
from megatron_dion.sharding import Weight
from megatron_dion.sharding.traffic import compression_pays

DION = "dion"
_BUFFER_TAG = "is_managed_by_layer_wise_optimizer"
_REASON_TAG = "dion_reason"
_WEIGHT_TAG = "dion_weight"
_RULES_TAG = "dion_rules"
_GROUPED_EXPERT = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<linear>linear_fc\d)\.(?P<kind>weight|bias)(?P<number>\d+)"
)


@dataclass(frozen=True)
class Route:
    """Where a parameter goes.

    Attributes:
        parameter: global name.
        shape: global shape.
        optimizer: `dion` or the name of the scalar optimizer.
        reason: why.
        matrices: the logical matrices of a parameter that goes to Dion.
        is_fp8: whether the model keeps it in FP8.
    """

    parameter: str
    shape: tuple[int, ...]
    optimizer: str
    reason: str
    matrices: tuple[Matrix, ...] = ()
    is_fp8: bool = False


@dataclass(frozen=True)
class RoutingTable:
    """The routes of all parameters of the model, of all pipeline stages."""

    routes: tuple[Route, ...]

    def with_gradient_sync(self) -> "RoutingTable":
        """Names the matrices of which replicas average whole gradients in place of factors.

        Raises:
            ValueError: these are all of Dion's, if there are any.
        """
        dense = {
            route.parameter
            for route in self.routes
            if route.matrices and not compression_pays(route.matrices)
        }
        if dense == {route.parameter for route in self.routes if route.matrices}:
            raise ValueError(
                "compressed gradient sync compresses nothing: no matrix of Dion's has factors that"
                " are smaller than its gradient; use a smaller rank fraction, or leave it out"
            )
        note = ", whole gradients averaged over instances"
        return RoutingTable(
            tuple(
                replace(route, reason=route.reason + note) if route.parameter in dense else route
                for route in self.routes
            )
        )

    def to_tsv(self) -> str:
        """A line for each logical matrix, and for each parameter of the scalar optimizer."""
        lines = ["parameter\tshape\toptimizer\treason\tmatrix\trows\tcolumns\trank"]
        for route in self.routes:
            shape = "x".join(map(str, route.shape))
            start = f"{route.parameter}\t{shape}\t{route.optimizer}\t{route.reason}"
            lines += [f"{start}\t{m.name}\t{m.rows}\t{m.columns}\t{m.rank}" for m in route.matrices]
            if not route.matrices:
                lines.append(f"{start}\t\t\t\t")
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """One line for each kind of matrix or parameter, layers and experts counted together."""
        kinds: Counter[str] = Counter()
        for route in self.routes:
            for matrix in route.matrices:
                size = f"{matrix.rows} x {matrix.columns}, rank {matrix.rank}"
                size += ", kept in FP8" if route.is_fp8 else ""
                kinds[f"{route.optimizer}: {without_numbers(matrix.name)} ({size})"] += 1
            if not route.matrices:
                size = " x ".join(map(str, route.shape))
                name = without_numbers(route.parameter)
                kinds[f"{route.optimizer}: {name} ({size}): {route.reason}"] += 1
        return "\n".join(f"{count:4d} {kind}" for kind, count in kinds.items())


def tag_matrices(
    model_chunks: list[MegatronModule], rules: RoutingRules | None = None
) -> list[MegatronModule]:
    """Marks every parameter with its decision; a `pre_wrap_hooks` function of Megatron's models.

    Raises:
        ValueError: a parameter cannot be what the rules want it to be.
    """
    rules = rules or RoutingRules()
    for named in _named_parameters(model_chunks):
        name, parameter = named.name, named.parameter
        reason = rules.reason_against(name, parameter)
        setattr(parameter, _BUFFER_TAG, reason is None)
        setattr(parameter, _REASON_TAG, reason or rules.reason_for(name))
        if reason is None:
            setattr(parameter, _WEIGHT_TAG, _weight(named, rules.split))
    for chunk in model_chunks:
        _check_one_fp8_buffer(chunk)
    for chunk in model_chunks:
        setattr(chunk, _RULES_TAG, rules)
    return model_chunks


def _is_fp8(parameter: Parameter) -> bool:
    """As the buffers see it: Transformer Engine has several classes of FP8 tensors."""
    return bool(param_and_grad_buffer._param_uses_quantized_storage(parameter))


def _check_one_fp8_buffer(chunk: MegatronModule) -> None:
    """DDP asserts that its FP8 weights are in one buffer (MC/.../param_and_grad_buffer.py:1703)."""
    first: dict[bool, dict[bool, str]] = {True: {}, False: {}}
    for named in _named_parameters([chunk]):
        if _is_fp8(named.parameter):
            of_experts = not getattr(named.parameter, "allreduce", True)
            first[of_experts].setdefault(weight_of(named.parameter) is not None, named.name)
    for names in first.values():
        if len(names) == 2:
            raise ValueError(
                f"{names[True]} would be Dion's and {names[False]} not, and both are kept in FP8,"
                " for which Megatron has one buffer: include or exclude all FP8 weights, or leave"
                " out --fp8-param-gather (or --fp8-output-proj)"
            )


def rules_of(model_chunks: Sequence[MegatronModule]) -> RoutingRules:
    """The rules by which `tag_matrices` has marked the parameters."""
    chunk: Any = model_chunks[0]
    while not hasattr(chunk, _RULES_TAG):
        chunk = chunk.module  # what DDP and mixed precision wrap
    rules: RoutingRules = getattr(chunk, _RULES_TAG)
    return rules


def weights_by_rules(
    model_chunks: Sequence[MegatronModule], rules: RoutingRules
) -> dict[Parameter, Weight]:
    """How the parameters that rules give to Dion lie in its logical matrices, marked or not."""
    return {
        named.parameter: _weight(named, rules.split)
        for named in _named_parameters(model_chunks)
        if rules.reason_against(named.name, named.parameter) is None
    }


def weight_of(parameter: Parameter) -> Weight | None:
    """The weight that Dion updates, or None for a parameter of the scalar optimizer."""
    return getattr(parameter, _WEIGHT_TAG, None)


def build_routing_table(
    model_chunks: list[MegatronModule], config: DionConfig, scalar_optimizer: str
) -> RoutingTable:
    """The table of the whole model, the same on every rank. A collective call of all ranks.

    Raises:
        RuntimeError: the model was wrapped without `tag_matrices`.
    """
    here = [
        _route(named.name, named.parameter, config, scalar_optimizer)
        for named in _named_parameters(model_chunks)
    ]
    everywhere: list[list[Route]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, here)
    distinct = {route.parameter: route for routes in everywhere for route in routes}
    return RoutingTable(
        tuple(sorted(distinct.values(), key=lambda route: in_order_of_layers(route.parameter)))
    )


@dataclass(frozen=True)
class _NamedParameter:
    """A trainable parameter of the model.

    Attributes:
        name: in the whole model, the same in every topology.
        parameter: this rank's.
        config: of the layer; the layers of a model may differ.
        is_grouped: whether it is an expert's, for a grouped GEMM.
    """

    name: str
    parameter: Parameter
    config: TransformerConfig
    is_grouped: bool


def _named_parameters(model_chunks: Sequence[MegatronModule]) -> Iterator[_NamedParameter]:
    for chunk in model_chunks:
        owners = {
            parameter: module
            for module in chunk.modules()
            for parameter in module.parameters(recurse=False)
        }
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                name = _name_of_module_tree(chunk, parameter)
                expert = _GROUPED_EXPERT.fullmatch(name)
                yield _NamedParameter(
                    name=_name_as_of_single_expert(expert, chunk.config) if expert else name,
                    parameter=parameter,
                    config=getattr(owners[parameter], "config", chunk.config),
                    is_grouped=expert is not None,
                )


def _name_of_module_tree(chunk: MegatronModule, parameter: Parameter) -> str:
    if getattr(parameter, "shared_embedding", False):
        # The last pipeline stage has a copy under the output layer's name if both are one weight.
        return "embedding.word_embeddings.weight"
    return re.sub(r"^(module\.)+", "", get_global_unique_param_name([chunk], parameter))


def _name_as_of_single_expert(expert: re.Match[str], config: TransformerConfig) -> str:
    """The name of a parameter for a grouped GEMM if its expert were a module of its own.

    So neither the matrices nor the checkpoints depend on how experts are multiplied.
    """
    number = int(expert["number"])
    if expert["kind"] == "bias":
        # Only weights have their global number already (MC/.../fsdp_dtensor_checkpoint.py:134).
        number += get_ep_layer_offset(config.num_moe_experts)
    return f"{expert['experts']}.local_experts.{number}.{expert['linear']}.{expert['kind']}"


def _route(name: str, parameter: Parameter, config: DionConfig, scalar_optimizer: str) -> Route:
    if not hasattr(parameter, _BUFFER_TAG):
        raise RuntimeError(
            f"{name} has no route: add megatron_dion.optimizer.routing.tag_matrices to the"
            " pre_wrap_hooks of the model's config, so that it runs before DDP wraps the model"
        )
    weight, is_fp8 = weight_of(parameter), _is_fp8(parameter)
    reason = getattr(parameter, _REASON_TAG) + (", kept in FP8" if is_fp8 else "")
    if weight is None:
        return Route(name, _global_shape(parameter), scalar_optimizer, reason, is_fp8=is_fp8)
    shape = (weight.global_rows, weight.global_columns)
    return Route(name, shape, DION, reason, tuple(weight.matrices(config)), is_fp8)


def _global_shape(parameter: Parameter) -> tuple[int, ...]:
    shape = list(parameter.shape)
    dim = _partition_dim(parameter)
    if dim is not None:
        shape[dim] *= _tensor_parallel_size(parameter)
    return tuple(shape)


def _partition_dim(parameter: Parameter) -> int | None:
    """The dimension that tensor parallelism splits, or None if every rank has the whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]  # set by Megatron's layers


def _tensor_parallel_size(parameter: Parameter) -> int:
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_tensor_model_parallel_world_size()
    return parallel_state.get_expert_tensor_parallel_world_size()


def tensor_parallel_rank(parameter: Parameter) -> int:
    """This rank's, among those that share a parameter."""
    if getattr(parameter, "allreduce", True):
        return int(parallel_state.get_tensor_model_parallel_rank())
    return int(parallel_state.get_expert_tensor_parallel_rank())


def _weight(named: _NamedParameter, split: frozenset[str]) -> Weight:
    """Describes a matrix parameter to the sharding code."""
    rows, columns = named.parameter.shape
    size = _tensor_parallel_size(named.parameter)
    pattern = row_pattern(named.name, rows, named.config, split, named.is_grouped)
    return Weight(
        name=named.name,
        rows=rows,
        columns=columns,
        partition_dim=_partition_dim(named.parameter) if size > 1 else None,
        tensor_parallel_size=size,
        parts=pattern.parts,
        separate_periods=pattern.separate_periods,
        joined=pattern.joined,
    )
