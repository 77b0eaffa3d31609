"""Which optimizer updates a parameter: one decision, made from names and global shapes.

The decision depends on nothing that a topology changes. `tag_matrices` writes it on the parameters
before Megatron's DDP lays out its buffers, because Dion's matrices get buffers of their own.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import _param_uses_quantized_storage
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    get_ep_layer_offset,
    get_global_unique_param_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Parameter

from megatron_dion.algorithm import DionConfig, Matrix
from megatron_dion.optimizer.fused import split_weight
from megatron_dion.optimizer.rules import RoutingRules, in_order_of_layers, without_numbers
from megatron_dion.sharding import Weight, compression_pays

DION = "dion"
_BUFFER_TAG = "is_managed_by_layer_wise_optimizer"  # Megatron's DDP makes buffers by it
ROUTE_TAG = "dion_route"  # the `Route` of a parameter of the model
_GROUPED_EXPERT = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<linear>linear_fc\d)\.(?P<kind>weight|bias)(?P<number>\d+)"
)


@dataclass(frozen=True)
class Route:
    """Which optimizer updates a parameter.

    Attributes:
        parameter: name in the whole model, the same in every topology.
        shape: of the whole parameter, of all tensor-parallel ranks.
        reason: why Dion updates it, or why not.
        weight: its logical matrices if Dion updates it, None if the scalar optimizer does.
        is_fp8: whether the model keeps it in FP8.
        rules: by which it was decided.
    """

    parameter: str
    shape: tuple[int, ...]
    reason: str
    weight: Weight | None
    is_fp8: bool
    rules: RoutingRules


@dataclass(frozen=True)
class RoutingTable:
    """The routes of all parameters of the model, of all pipeline stages.

    Attributes:
        routes: in the order of layers.
        config: gives the ranks of the matrices.
        scalar_optimizer: name of the optimizer that updates what Dion does not.
        compressed_sync: whether replicas average factors in place of gradients where that is less.

    Raises:
        ValueError: compressed_sync, and factors are less for none of the matrices.
    """

    routes: tuple[Route, ...]
    config: DionConfig
    scalar_optimizer: str
    compressed_sync: bool = False

    def __post_init__(self) -> None:
        matrices = [route.weight.matrices(self.config) for route in self.routes if route.weight]
        if self.compressed_sync and matrices and not any(map(compression_pays, matrices)):
            raise ValueError(
                "compressed gradient sync compresses nothing: no matrix of Dion's has factors that"
                " are smaller than its gradient; use a smaller rank fraction, or leave it out"
            )

    def to_tsv(self) -> str:
        """A line for each logical matrix, and for each parameter of the scalar optimizer."""
        lines = ["parameter\tshape\toptimizer\treason\tmatrix\trows\tcolumns\trank"]
        for route, optimizer, reason, matrix in self._lines():
            shape = "x".join(map(str, route.shape))
            m = (matrix.name, matrix.rows, matrix.columns, matrix.rank) if matrix else [""] * 4
            lines.append("\t".join(map(str, (route.parameter, shape, optimizer, reason, *m))))
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """One line for each kind of matrix or parameter, layers and experts counted together."""
        kinds: Counter[str] = Counter()
        for route, optimizer, reason, matrix in self._lines():
            if matrix:
                fp8 = ", kept in FP8" if route.is_fp8 else ""
                size = f"{matrix.rows} x {matrix.columns}, rank {matrix.rank}{fp8}"
                kinds[f"{optimizer}: {without_numbers(matrix.name)} ({size})"] += 1
            else:
                size = " x ".join(map(str, route.shape))
                kinds[f"{optimizer}: {without_numbers(route.parameter)} ({size}): {reason}"] += 1
        return "\n".join(f"{count:4d} {kind}" for kind, count in kinds.items())

    def _lines(self) -> Iterator[tuple[Route, str, str, Matrix | None]]:
        """Route, optimizer and reason for each matrix, or for a parameter that has none."""
        for route in self.routes:
            matrices = route.weight.matrices(self.config) if route.weight else []
            optimizer = DION if matrices else self.scalar_optimizer
            reason = route.reason + (", kept in FP8" if route.is_fp8 else "")
            if self.compressed_sync and matrices and not compression_pays(matrices):
                reason += ", whole gradients averaged over instances"
            for matrix in matrices or (None,):
                yield route, optimizer, reason, matrix


def tag_matrices(
    model_chunks: list[MegatronModule], rules: RoutingRules | None = None
) -> list[MegatronModule]:
    """Decides about every parameter; a `pre_wrap_hooks` function of Megatron's models.

    Raises:
        ValueError: the rules ask for what a parameter cannot be, or divide Megatron's FP8 buffer.
    """
    rules = rules or RoutingRules()
    for chunk in model_chunks:
        fp8: dict[bool, dict[bool, str]] = {False: {}, True: {}}  # names: of experts, of Dion
        for parameter, route in routes_by_rules(chunk, rules):
            is_dion = route.weight is not None
            setattr(parameter, _BUFFER_TAG, is_dion)
            setattr(parameter, ROUTE_TAG, route)
            if route.is_fp8:
                fp8[_is_of_experts(parameter)][is_dion] = route.parameter
        for names in fp8.values():  # DDP asserts it (MC/.../param_and_grad_buffer.py:1703)
            if len(names) == 2:
                raise ValueError(
                    f"{names[True]} would be Dion's and {names[False]} not, and both are kept in"
                    " FP8, for which Megatron has one buffer: include or exclude all FP8 weights,"
                    " or leave out --fp8-param-gather (or --fp8-output-proj)"
                )
    return model_chunks


def routes_by_rules(
    chunk: MegatronModule, rules: RoutingRules
) -> Iterator[tuple[Parameter, Route]]:
    """The trainable parameters of a chunk with the routes that rules give them.

    The rules may be those of a checkpoint, not the ones by which this run has decided.
    """
    modules = {p: module for module in chunk.modules() for p in module.parameters(recurse=False)}
    for parameter in chunk.parameters():
        if not parameter.requires_grad:
            continue
        name = _name_in_module_tree(chunk, parameter)
        expert = _GROUPED_EXPERT.fullmatch(name)
        if expert:
            name = _name_as_of_single_expert(expert, chunk.config)
        size, dim = _tensor_parallel_size(parameter), None
        if size > 1 and getattr(parameter, "tensor_model_parallel", False):
            dim = parameter.partition_dim
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= size
        is_dion, reason = rules.decide(name, parameter)
        weight = None
        if is_dion:
            rows, columns = parameter.shape
            weight = Weight(name, rows, columns, dim, size)
            layer = getattr(modules[parameter], "config", chunk.config)  # layers may differ
            weight = split_weight(weight, layer, rules.split, is_grouped=expert is not None)
        is_fp8 = bool(_param_uses_quantized_storage(parameter))
        yield parameter, Route(name, tuple(shape), reason, weight, is_fp8, rules)


def weight_of(parameter: Parameter) -> Weight | None:
    """The weight that Dion updates, or None for a parameter of the scalar optimizer."""
    route: Route | None = getattr(parameter, ROUTE_TAG, None)
    return route.weight if route else None


def gather_routes(model_chunks: Sequence[MegatronModule]) -> tuple[Route, ...]:
    """All routes of the model, the same on every rank. A collective call of all ranks.

    Raises:
        RuntimeError: the model was wrapped without `tag_matrices`.
    """
    parameters = (p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad)
    here = [getattr(parameter, ROUTE_TAG, None) for parameter in parameters]
    if None in here:
        raise RuntimeError(
            "the model's parameters have no routes: add"
            " megatron_dion.optimizer.routing.tag_matrices to the pre_wrap_hooks of the model's"
            " config, so that it runs before DDP wraps the model"
        )
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, here)
    distinct = {route.parameter: route for routes in everywhere for route in routes}
    return tuple(sorted(distinct.values(), key=lambda route: in_order_of_layers(route.parameter)))


def _name_in_module_tree(chunk: MegatronModule, parameter: Parameter) -> str:
    if getattr(parameter, "shared_embedding", False):
        # The last pipeline stage has a copy under the output layer's name if both are one weight.
        return "embedding.word_embeddings.weight"
    return re.sub(r"^(module\.)+", "", get_global_unique_param_name([chunk], parameter))


def _name_as_of_single_expert(expert: re.Match[str], config: TransformerConfig) -> str:
    """The name that a parameter for a grouped GEMM has where each expert is a module of its own.

    So neither the matrices nor the checkpoints depend on how experts are multiplied.
    """
    number = int(expert["number"])
    if expert["kind"] == "bias":
        # Only weights have their global number already (MC/.../fsdp_dtensor_checkpoint.py:134).
        number += get_ep_layer_offset(config.num_moe_experts)
    return f"{expert['experts']}.local_experts.{number}.{expert['linear']}.{expert['kind']}"


def _is_of_experts(parameter: Parameter) -> bool:
    """Whether the groups of expert parallelism hold it (Megatron's own mark)."""
    return not getattr(parameter, "allreduce", True)


def _tensor_parallel_size(parameter: Parameter) -> int:
    if _is_of_experts(parameter):
        return parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_parallel_rank(parameter: Parameter) -> int:
    """This rank's, among those that share a parameter."""
    if _is_of_experts(parameter):
        return int(parallel_state.get_expert_tensor_parallel_rank())
    return int(parallel_state.get_tensor_model_parallel_rank())
