"""Builds the chain of optimizers: Dion for matrices, Adam or Lion for everything else."""

import copy
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import (
    OptimizerConfig,
    _get_megatron_optimizer_based_on_param_groups,
    _get_param_groups_and_buffers,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch.nn import Parameter

from megatron_dion.algorithm import DionConfig
from megatron_dion.optimizer.chain import DionChainedOptimizer
from megatron_dion.optimizer.compressed_sync import reduce_within_instances
from megatron_dion.optimizer.dion import Dion
from megatron_dion.optimizer.distributed import DionDistributedOptimizer
from megatron_dion.optimizer.record import Record
from megatron_dion.optimizer.routing import DION, RoutingTable, gather_routes, weight_of

Overrides = dict[ParamKey, ParamGroupOverride]


def get_megatron_dion_optimizer(
    config: OptimizerConfig,
    model_chunks: list[MegatronModule],
    dion_config: DionConfig,
    scalar_optimizer: str = "adam",
    scalar_lr_mult: float = 1.0,
    compressed_sync: bool = False,
    recenter_interval: int | None = None,
    config_overrides: Overrides | None = None,
    use_gloo_process_groups: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
) -> DionChainedOptimizer:
    """Dion's counterpart of `megatron.core.optimizer.get_megatron_optimizer`.

    Args:
        config: Megatron's optimizer config; `use_distributed_optimizer` must be set.
        model_chunks: DDP-wrapped chunks of a model that `tag_matrices` has seen before.
        dion_config: Dion's hyperparameters.
        scalar_optimizer: `adam` or `lion`, for everything that is not a linear layer's matrix.
        scalar_lr_mult: its learning rate as a multiple of the matrices'.
        compressed_sync: average P and R, not gradients, over instances of the distributed
            optimizer, where these are smaller.
        recenter_interval: with it, steps between averagings of the instances' momenta.
        config_overrides: Megatron's overrides of learning rate and weight decay per parameter.
        use_gloo_process_groups: as for Megatron's function.
        pg_collection: as for Megatron's function.

    Raises:
        ValueError: the config asks for something that Dion does not do, or compressed_sync for
            matrices of which none would be compressed.
        RuntimeError: the model was wrapped without `tag_matrices`.
    """
    if not config.use_distributed_optimizer:
        raise ValueError("Dion needs the distributed optimizer: use_distributed_optimizer=True")
    routes = gather_routes(model_chunks)
    table = RoutingTable(routes, dion_config, scalar_optimizer, compressed_sync)
    if config_overrides is None:
        config_overrides = get_standard_config_overrides(config)
    # Megatron looks up state names by this name, and a chain must have one config.
    config = copy.copy(config)
    config.optimizer = scalar_optimizer
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        pg_collection, model_chunks, use_gloo_process_groups
    )
    replicas = groups["inter_dist_opt_group"] if compressed_sync else None
    if compressed_sync:
        if replicas is None or replicas.size() == 1:
            raise ValueError("compressed_sync needs several instances of the distributed optimizer")
        reduce_within_instances(model_chunks)
    pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    overrides = {**config_overrides, **_overrides_by_route(config, scalar_lr_mult)}
    parts = partial(_parts, config, model_chunks, overrides, groups)
    scalar = [
        _get_megatron_optimizer_based_on_param_groups(
            config=config, pg_collection=pg_collection, **arguments
        )
        for _, arguments in parts(is_dion=False)
    ]
    dion = [
        DionDistributedOptimizer(
            Dion(
                arguments.pop("param_groups"),
                lr=config.lr,
                weight_decay=config.weight_decay,
                **asdict(dion_config),
            ),
            config,
            scalar[0].grad_scaler,
            lambda optimizer, config=None: optimizer.init_state(),
            tensor_group=pg_collection.expt_tp if is_of_experts else pg_collection.tp,
            replicas=replicas,
            recenter_interval=recenter_interval,
            **arguments,
        )
        for is_of_experts, arguments in parts(is_dion=True)
    ]
    for optimizer in (*dion, *scalar):
        optimizer.grad_scaler = scalar[0].grad_scaler  # all skip a step together
        optimizer.grad_stats_parallel_group = groups["intra_dist_opt_group"]
        optimizer.tp_group, optimizer.expert_tp_group = pg_collection.tp, pg_collection.expt_tp
    chain = DionChainedOptimizer([*dion, *scalar])
    chain.routing_table = table
    chain.record = Record(dion_config, routes[0].rules, scalar_optimizer)
    total = torch.tensor([sum(one.exchanged_bytes_per_step for one in dion)], device="cuda")
    torch.distributed.all_reduce(total)
    chain.exchanged_bytes_per_step = int(total.item())
    return chain


def _overrides_by_route(config: OptimizerConfig, scalar_lr_mult: float) -> Overrides:
    """The routing in Megatron's own terms: overrides of parameter groups."""
    is_dion = ParamPredicate(name="dion_matrix", fn=lambda p: weight_of(p) is not None)
    overrides: Overrides = {ParamKey(predicate=is_dion): ParamGroupOverride(optimizer=DION)}
    if scalar_lr_mult != 1.0:

        def takes_multiple(parameter: Parameter) -> bool:
            is_embedding = getattr(parameter, "is_embedding_or_output_parameter", False)
            has_own_lr = config.decoupled_lr is not None and is_embedding
            return weight_of(parameter) is None and not has_own_lr

        predicate = ParamPredicate(name="dion_scalar", fn=takes_multiple)
        overrides[ParamKey(predicate=predicate)] = ParamGroupOverride(
            max_lr=config.lr * scalar_lr_mult, min_lr=(config.min_lr or 0.0) * scalar_lr_mult
        )
    return overrides


def _parts(
    config: OptimizerConfig,
    model_chunks: list[MegatronModule],
    overrides: Overrides,
    groups: dict[str, Any],
    is_dion: bool,
) -> Iterator[tuple[bool, dict[str, Any]]]:
    """What the optimizers of Dion's parameters, or of all others, are made with.

    Yields:
        For dense and for experts' parameters, if there are any: whether they are experts', and
        arguments. Each optimizer has whole buffers.
    """
    for is_of_experts in (False, True):
        param_groups, buffers = _get_param_groups_and_buffers(
            model_chunks,
            0,
            config,
            overrides,
            partial(_is_kind, is_of_experts, is_dion),
            "expert_parallel_buffers" if is_of_experts else "buffers",
        )
        data_parallel = "intra_expt_dp_group" if is_of_experts else "intra_dp_cp_group"
        model_parallel = "expt_tp_pp_with_egtp_remat_group" if is_of_experts else "mp_group"
        instances = groups["inter_dist_opt_group"]
        arguments = {
            "model_chunks": model_chunks,
            "param_groups": param_groups,
            "per_model_buffers": {
                chunk: [one for one in of_chunk if bool(weight_of(one.params[0])) == is_dion]
                for chunk, of_chunk in buffers.items()
            },
            "data_parallel_group": groups[data_parallel],
            "data_parallel_group_gloo": groups[f"{data_parallel}_gloo"],
            "data_parallel_group_idx": groups[model_parallel].rank(),
            "distributed_optimizer_instance_id": instances.rank() if instances else 0,
        }
        if param_groups:
            yield is_of_experts, arguments


def _is_kind(is_of_experts: bool, is_dion: bool, group: dict[str, Any]) -> bool:
    kind = (group["is_expert_parallel"], group.get("optimizer") == DION)
    return kind == (is_of_experts, is_dion)
