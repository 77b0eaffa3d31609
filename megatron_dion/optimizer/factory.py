"""Builds the chain of optimizers: Dion for matrices, Adam or Lion for everything else."""

import copy
from collections import defaultdict
from dataclasses import dataclass, replace
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
from torch.distributed import ProcessGroup

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
    True: ("intra_expt_dp_group", "expt_tp_pp_with_egtp_remat_group", "expert_parallel_buffers"),
}


def get_megatron_dion_optimizer(
    config: OptimizerConfig,
    model_chunks: list[MegatronModule],
    dion_config: DionConfig | DionOptions,
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
        dion_config: Dion's hyperparameters, or all options of a run together.
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
    if isinstance(dion_config, DionConfig):
        dion_config = DionOptions(dion_config)
    dion = replace(dion_config, **options)
    routes = gather_routes(model_chunks)
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
    builder = _Builder(config, model_chunks, dion, groups, instances, pg_collection)
    optimizers = builder.optimizers(param_groups)
    table = RoutingTable(routes, dion.config, dion.scalar_optimizer, dion.compressed_sync)
    record = Record(dion.config, routes[0].rules, dion.scalar_optimizer)
    return DionChainedOptimizer(optimizers, table, record)


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


@dataclass(frozen=True)
class _Builder:
    """What the optimizers of a chain have in common."""

    config: OptimizerConfig
    model_chunks: list[MegatronModule]
    options: DionOptions
    groups: dict[str, Any]  # process groups by Megatron's names
    instances: ProcessGroup | None  # the same ranks of all distributed-optimizer instances
    pg_collection: ProcessGroupCollection

    def optimizers(self, param_groups: list[dict[str, Any]]) -> list[Any]:
        """Dion's optimizers and then the scalar ones, each for dense layers and for experts."""
        by_kind: dict[tuple[bool, bool], list[dict[str, Any]]] = defaultdict(list)
        for group in param_groups:
            by_kind[group.get("optimizer") == DION, group["is_expert_parallel"]].append(group)
        both = (False, True)
        scalars = [self._scalar(by_kind[False, e], e) for e in both if (False, e) in by_kind]
        # The optimizers share one loss scaler, because they skip a step together.
        scaler = scalars[0].grad_scaler if scalars else None
        dions = [self._dion(by_kind[True, e], e, scaler) for e in both if (True, e) in by_kind]
        for optimizer in (*dions, *scalars):
            optimizer.grad_scaler = scaler
            optimizer.grad_stats_parallel_group = self.groups["intra_dist_opt_group"]
            optimizer.tp_group = self.pg_collection.tp
            optimizer.expert_tp_group = self.pg_collection.expt_tp
        return [*dions, *scalars]

    def _scalar(self, param_groups: list[dict[str, Any]], is_of_experts: bool) -> Any:
        return _get_megatron_optimizer_based_on_param_groups(
            config=self.config,
            param_groups=param_groups,
            pg_collection=self.pg_collection,
            **self._arguments(False, is_of_experts),
        )

    def _dion(self, param_groups: list[dict[str, Any]], is_of_experts: bool, scaler: Any) -> Any:
        options, pg_collection = self.options, self.pg_collection
        return DionDistributedOptimizer(
            Dion(param_groups, self.config.lr, self.config.weight_decay, options.config),
            self.config,
            scaler,
            lambda inner, config=None: inner.bind(),
            tensor_group=pg_collection.expt_tp if is_of_experts else pg_collection.tp,
            replicas=self.instances if options.compressed_sync else None,
            recenter_interval=options.recenter_interval,
            **self._arguments(True, is_of_experts),
        )

    def _arguments(self, is_dion: bool, is_of_experts: bool) -> dict[str, Any]:
        data_parallel, model_parallel, buffers = _NAMES[is_of_experts]
        per_chunk = [
            [b for b in getattr(chunk, buffers) if bool(weight_of(b.params[0])) == is_dion]
            for chunk in self.model_chunks
        ]
        return {
            "model_chunks": self.model_chunks,
            "per_model_buffers": dict(enumerate(per_chunk)),
            "data_parallel_group": self.groups[data_parallel],
            "data_parallel_group_gloo": self.groups[f"{data_parallel}_gloo"],
            "data_parallel_group_idx": self.groups[model_parallel].rank(),
            "distributed_optimizer_instance_id": self.instances.rank() if self.instances else 0,
        }
