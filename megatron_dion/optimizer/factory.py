"""Builds the chain of optimizers: Dion for matrices, Adam or Lion for everything else."""

import copy
from dataclasses import replace
from itertools import product
from typing import Any

from megatron.core.optimizer import (
    OptimizerConfig,
    _get_megatron_optimizer_based_on_param_groups,
    _get_param_groups,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.optimizer.chain import DionChainedOptimizer
from megatron_dion.optimizer.compressed_sync import reduce_within_instances
from megatron_dion.optimizer.dion import Dion
from megatron_dion.optimizer.distributed import DionDistributedOptimizer
from megatron_dion.optimizer.options import DionOptions
from megatron_dion.optimizer.record import Record
from megatron_dion.optimizer.routing import DION, RoutingTable, gather_routes, weight_of

# Data-parallel group, model-parallel group and DDP's buffers, of dense layers and of experts.
_NAMES = {
    False: ("intra_dp_cp_group", "mp_group", "buffers"),
    True: ("intra_expt_dp_group", "expt_tp_pp_group", "expert_parallel_buffers"),
}


def get_megatron_dion_optimizer(
    config: OptimizerConfig,
    model_chunks: list[MegatronModule],
    dion: DionConfig | DionOptions,
    *,
    config_overrides: dict[ParamKey, ParamGroupOverride] | None = None,
    use_gloo_process_groups: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    **options: Any,
) -> DionChainedOptimizer:
    """Dion's counterpart of `megatron.core.optimizer.get_megatron_optimizer`.

    Args:
        config: Megatron's optimizer config; `use_distributed_optimizer` must be set.
        model_chunks: DDP-wrapped chunks of a model that `tag_matrices` has seen before.
        dion: Dion's hyperparameters, or all options of a run together. The routing rules
            are those of `tag_matrices` in any case.
        config_overrides: as for Megatron's function.
        use_gloo_process_groups: as for Megatron's function.
        pg_collection: as for Megatron's function.
        **options: fields of `DionOptions`, such as `scalar_optimizer="lion"`.

    Raises:
        ValueError: the config asks for something that Dion does not do.
        RuntimeError: the model was wrapped without `tag_matrices`.
    """
    if not config.use_distributed_optimizer:
        raise ValueError("Dion needs the distributed optimizer: use_distributed_optimizer=True")
    if isinstance(dion, DionConfig):
        dion = DionOptions(dion)
    routes = gather_routes(model_chunks)
    dion = replace(dion, rules=routes[0].rules, **options)
    # Megatron looks up state names by this name, and a chain must have one config.
    config = copy.copy(config)
    config.optimizer = dion.scalar_optimizer
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        pg_collection, model_chunks, use_gloo_process_groups
    )
    instances = groups["inter_dist_opt_group"]
    if dion.compressed_sync:
        if instances is None or instances.size() == 1:
            raise ValueError("compressed_sync needs several instances of the distributed optimizer")
        reduce_within_instances(model_chunks)
    pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    param_groups = _param_groups(config, model_chunks, dion, config_overrides)
    optimizers = _optimizers(config, model_chunks, dion, groups, pg_collection, param_groups)
    record = Record(dion.config, dion.rules, dion.scalar_optimizer)
    return DionChainedOptimizer(optimizers, RoutingTable(routes, dion), record)


def _param_groups(
    config: OptimizerConfig,
    model_chunks: list[MegatronModule],
    dion: DionOptions,
    overrides: dict[ParamKey, ParamGroupOverride] | None,
) -> list[dict[str, Any]]:
    """Megatron's parameter groups, of which those of Dion's matrices have `optimizer` `DION`."""
    if overrides is None:
        overrides = get_standard_config_overrides(config)
    has_matrices = ParamPredicate("dion_matrix", lambda parameter: bool(weight_of(parameter)))
    by_route = {ParamKey(predicate=has_matrices): ParamGroupOverride(optimizer=DION)}
    param_groups: list[dict[str, Any]]
    param_groups = _get_param_groups(model_chunks, config, {**overrides, **by_route})
    if dion.scalar_lr_mult != 1.0:
        rates = [(rate or 0.0) * dion.scalar_lr_mult for rate in (config.lr, config.min_lr)]
        for group in param_groups:  # but those with a rate of their own, such as --decoupled-lr
            if group.get("optimizer") != DION and group["default_config"]:
                group.update(max_lr=rates[0], min_lr=rates[1], default_config=False)
    return param_groups


def _optimizers(
    config: OptimizerConfig,
    model_chunks: list[MegatronModule],
    dion: DionOptions,
    groups: dict[str, Any],
    pg_collection: ProcessGroupCollection,
    param_groups: list[dict[str, Any]],
) -> list[Any]:
    """Dion's optimizers and then the scalar ones, each for dense layers and for experts."""
    optimizers: dict[bool, list[Any]] = {True: [], False: []}  # by whether they are Dion's
    scaler = None  # one for all, because they skip a step together
    for is_dion, is_of_experts in product((False, True), repeat=2):
        of_kind = [g for g in param_groups if (g.get("optimizer") == DION) == is_dion]
        own = [group for group in of_kind if group["is_expert_parallel"] == is_of_experts]
        if not own:
            continue
        arguments = _arguments(model_chunks, groups, is_dion, is_of_experts)
        if is_dion:
            optimizer = DionDistributedOptimizer(
                Dion(own, config.lr, config.weight_decay, dion.config),
                config,
                scaler,
                lambda inner, config=None: inner.bind(),
                tensor_group=pg_collection.expt_tp if is_of_experts else pg_collection.tp,
                replicas=groups["inter_dist_opt_group"] if dion.compressed_sync else None,
                recenter_interval=dion.recenter_interval,
                **arguments,
            )
        else:
            optimizer = _get_megatron_optimizer_based_on_param_groups(
                config=config, param_groups=own, pg_collection=pg_collection, **arguments
            )
            scaler = scaler or optimizer.grad_scaler
        optimizer.grad_scaler = scaler
        optimizer.grad_stats_parallel_group = groups["intra_dist_opt_group"]
        optimizer.tp_group, optimizer.expert_tp_group = pg_collection.tp, pg_collection.expt_tp
        optimizers[is_dion].append(optimizer)
    return [*optimizers[True], *optimizers[False]]


def _arguments(
    model_chunks: list[MegatronModule], groups: dict[str, Any], is_dion: bool, is_of_experts: bool
) -> dict[str, Any]:
    """What Megatron's constructors of either optimizer take."""
    data_parallel, model_parallel, buffers = _NAMES[is_of_experts]
    per_chunk = [
        [b for b in getattr(chunk, buffers) if bool(weight_of(b.params[0])) == is_dion]
        for chunk in model_chunks
    ]
    instances = groups["inter_dist_opt_group"]
    return {
        "model_chunks": model_chunks,
        "per_model_buffers": dict(enumerate(per_chunk)),
        "data_parallel_group": groups[data_parallel],
        "data_parallel_group_gloo": groups[f"{data_parallel}_gloo"],
        "data_parallel_group_idx": groups[model_parallel].rank(),
        "distributed_optimizer_instance_id": instances.rank() if instances else 0,
    }
