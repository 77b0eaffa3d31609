"""Which optimizer updates a parameter: one decision, made from names and global shapes.

The decision depends on nothing that a topology changes. `tag_matrices` writes it on the parameters
before Megatron's DDP lays out its buffers, because Dion's matrices get buffers of their own.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    get_ep_layer_offset,
    get_global_unique_param_name,
)
from megatron.core.transformer.module import MegatronModule
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_dion.checkpointing.agreement import gather
from megatron_dion.optimizer.fused import split_weight
from megatron_dion.optimizer.options import DionOptions
from megatron_dion.optimizer.rules import RoutingRules, in_order_of_layers, without_numbers
from megatron_dion.sharding.matrices import Weight, compression_pays

DION = "dion"
_BUFFER_TAG = "is_managed_by_layer_wise_optimizer"  # Megatron's DDP makes buffers by it
ROUTE_TAG = "dion_route"  # the `Route` of a parameter of the model
_GROUPED_EXPERT = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<linear>linear_fc\d)\.(?P<kind>weight|bias)(?P<number>\d+)"
)


@dataclass(frozen=True)
class Route:
    """Which optimizer updates a parameter."""

    parameter: str  # name in the whole model, the same in every topology
    shape: tuple[int, ...]  # of the whole parameter, of all tensor-parallel ranks
    reason: str  # why Dion updates it, or why not
    weight: Weight | None  # its logical matrices if Dion updates it
    rules: RoutingRules  # by which it was decided


@dataclass(frozen=True)
class RoutingTable:
    """The routes of all parameters of the model, of all pipeline stages, in the order of layers."""

    routes: tuple[Route, ...]
    options: DionOptions

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The lines of routing.tsv: one for each logical matrix, or parameter that has none."""
        options = self.options
        for route in self.routes:
            matrices = route.weight.matrices(options.config) if route.weight else []
            shape, reason = "x".join(map(str, route.shape)), route.reason
            if options.compressed_sync and matrices:
                if not compression_pays(matrices):
                    reason += ", whole gradients averaged over instances"
                elif options.config.residual != "none":
                    reason += ", without the residual, which differs between instances"
            for m in matrices:
                matrix = (m.name, str(m.rows), str(m.columns), str(m.rank))
                yield route.parameter, shape, DION, reason, *matrix
            if not matrices:
                yield route.parameter, shape, options.scalar_optimizer, reason, "", "", "", ""

    def to_tsv(self) -> str:
        """The text of routing.tsv."""
        head = ("parameter", "shape", "optimizer", "reason", "matrix", "rows", "columns", "rank")
        return "".join("\t".join(row) + "\n" for row in (head, *self.rows()))

    def summary(self) -> str:
        """One line for each kind of matrix or parameter, layers and experts counted together."""
        kinds: Counter[str] = Counter()
        for parameter, shape, optimizer, reason, matrix, rows, columns, rank in self.rows():
            size = f"{rows}x{columns}, rank {rank}" if matrix else shape
            kinds[f"{optimizer}: {without_numbers(matrix or parameter)} ({size}): {reason}"] += 1
        return "\n".join(f"{count:4d} {kind}" for kind, count in kinds.items())


def tag_matrices(
    model_chunks: list[MegatronModule], rules: RoutingRules | None = None
) -> list[MegatronModule]:
    """Decides about every parameter; a `pre_wrap_hooks` function of Megatron's models.

    Raises:
        ValueError: the rules ask for what a parameter cannot be, or divide Megatron's FP8 buffer.
    """
    for chunk in model_chunks:
        in_fp8: dict[bool, Route] = {}  # one of dense layers and one of experts
        for parameter, route in routes_by_rules(chunk, rules or RoutingRules()):
            is_dion = route.weight is not None
            setattr(parameter, _BUFFER_TAG, is_dion)
            setattr(parameter, ROUTE_TAG, route)
            if _is_quantized(parameter):
                other = in_fp8.setdefault(_is_of_experts(parameter), route)
                if is_dion != (other.weight is not None):  # DDP asserts it
                    raise ValueError(
                        f"of {other.parameter} and {route.parameter} one would be Dion's, and both"
                        " are kept in FP8, for which Megatron has one buffer: include or exclude"
                        " all FP8 weights, or leave out --fp8-param-gather (or --fp8-output-proj)"
                    )
    return model_chunks


def routes_by_rules(
    chunk: MegatronModule, rules: RoutingRules
) -> Iterator[tuple[Parameter, Route]]:
    """The trainable parameters of a chunk with the routes that rules give them.

    The rules may be those of a checkpoint, not the ones by which this run has decided.
    """
    modules = {p: module for module in chunk.modules() for p in module.parameters(recurse=False)}
    for parameter, module in modules.items():
        if not parameter.requires_grad:
            continue
        name, is_grouped = _name_of(chunk, parameter)
        is_dion, reason = rules.decide(name, parameter)
        if _is_quantized(parameter):
            reason += ", kept in FP8"
        size = tensor_parallel_group(parameter).size()
        is_cut = size > 1 and getattr(parameter, "tensor_model_parallel", False)
        dim = parameter.partition_dim if is_cut else None
        shape = tuple(n * size if i == dim else n for i, n in enumerate(parameter.shape))
        weight = None
        if is_dion:
            rows, columns = parameter.shape
            layer = getattr(module, "config", chunk.config)  # layers may differ
            whole = Weight(name, rows, columns, dim, size)
            weight = split_weight(whole, layer, rules.split, is_grouped)
        yield parameter, Route(name, shape, reason, weight, rules)


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
    here: list[Any] = [getattr(parameter, ROUTE_TAG, None) for parameter in parameters]
    if None in here:
        raise RuntimeError(
            "the model's parameters have no routes: call"
            " megatron_dion.optimizer.routing.tag_matrices before DDP wraps the model"
        )
    distinct = {route.parameter: route for route in gather(here)}
    return tuple(sorted(distinct.values(), key=lambda route: in_order_of_layers(route.parameter)))


def tensor_parallel_group(parameter: Parameter) -> ProcessGroup:
    """The ranks that share a parameter."""
    if _is_of_experts(parameter):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _name_of(chunk: MegatronModule, parameter: Parameter) -> tuple[str, bool]:
    """A parameter's name in the whole model, and whether it is for a grouped GEMM of experts.

    Neither matrices nor checkpoints depend on how experts are multiplied: each has its own name.
    """
    if getattr(parameter, "shared_embedding", False):
        # The last pipeline stage has a copy under the output layer's name if both are one weight.
        return "embedding.word_embeddings.weight", False
    name = re.sub(r"^(module\.)+", "", get_global_unique_param_name([chunk], parameter))
    expert = _GROUPED_EXPERT.fullmatch(name)
    if expert is None:
        return name, False
    number = int(expert["number"])
    if expert["kind"] == "bias":
        # Only weights have their global number already (MC/.../fsdp_dtensor_checkpoint.py:134).
        number += get_ep_layer_offset(chunk.config.num_moe_experts)
    return f"{expert['experts']}.local_experts.{number}.{expert['linear']}.{expert['kind']}", True


def _is_of_experts(parameter: Parameter) -> bool:
    """Whether the groups of expert parallelism hold it (Megatron's own mark)."""
    return not getattr(parameter, "allreduce", True)


def _is_quantized(parameter: Parameter) -> bool:
    """Whether Megatron's DDP puts a parameter into a buffer of bytes."""
    buffers = param_and_grad_buffer
    return buffers.is_float8tensor(parameter) or buffers.is_nvfp4tensor(parameter)
