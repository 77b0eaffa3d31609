"""Builds the chain of optimizers: Dion for matrices, Adam or Lion for everything else."""

import copy
from dataclasses import asdict
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import (
    OptimizerConfig,
    _get_megatron_optimizer_based_on_param_groups,
    _get_param_groups,
    get_standard_config_overrides,
)
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_dion.algorithm import DionConfig
from megatron_dion.optimizer.chain import DionChainedOptimizer
from megatron_dion.optimizer.compressed_sync import keep_gradients_apart
from megatron_dion.optimizer.dion import Dion
from megatron_dion.optimizer.distributed import DionDistributedOptimizer
from megatron_dion.optimizer.record import Record
from megatron_dion.optimizer.routing import DION, build_routing_table, rules_of, weight_of

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
    table = build_routing_table(model_chunks, dion_config, scalar_optimizer)
    if compressed_sync:
        table = table.with_gradient_sync()
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
        keep_gradients_apart(model_chunks)
    builder = _Builder(
        config,
        model_chunks,
        {**config_overrides, **_routes(config, scalar_lr_mult)},
        groups,
        pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
    )
    scalar = [builder.scalar(experts) for experts in builder.kinds(is_dion=False)]
    scaler = scalar[0].grad_scaler
    for optimizer in scalar:
        optimizer.grad_scaler = scaler
    dion = [
        builder.dion(experts, dion_config, scaler, replicas, recenter_interval)
        for experts in builder.kinds(is_dion=True)
    ]
    chain = DionChainedOptimizer([*dion, *scalar])
    chain.routing_table = table
    chain.record = Record(dion_config, rules_of(model_chunks), scalar_optimizer)
    chain.exchanged_bytes_per_step = _sum_over_ranks(
        sum(optimizer.exchanged_bytes_per_step for optimizer in dion)
    )
    return chain


def _sum_over_ranks(value: int) -> int:
    total = torch.tensor([value], device="cuda")
    torch.distributed.all_reduce(total)
    return int(total.item())


def _routes(config: OptimizerConfig, scalar_lr_mult: float) -> Overrides:
    """The routing in Megatron's own terms: overrides of parameter groups."""
    is_dion = ParamPredicate(name="dion_matrix", fn=lambda p: weight_of(p) is not None)
    routes: Overrides = {ParamKey(predicate=is_dion): ParamGroupOverride(optimizer=DION)}
    if scalar_lr_mult != 1.0:
        has_own_lr = config.decoupled_lr is not None

        def takes_multiple(parameter: Parameter) -> bool:
            decoupled = getattr(parameter, "is_embedding_or_output_parameter", False)
            return weight_of(parameter) is None and not (has_own_lr and decoupled)

        predicate = ParamPredicate(name="dion_scalar", fn=takes_multiple)
        routes[ParamKey(predicate=predicate)] = ParamGroupOverride(
            max_lr=config.lr * scalar_lr_mult, min_lr=(config.min_lr or 0.0) * scalar_lr_mult
        )
    return routes


class _Builder:
    """Optimizers over dense or expert parameters, each over whole buffers."""

    def __init__(
        self,
        config: OptimizerConfig,
        model_chunks: list[MegatronModule],
        overrides: Overrides,
        groups: dict[str, Any],
        pg_collection: ProcessGroupCollection,
    ) -> None:
        self._config = config
        self._model_chunks = model_chunks
        self._all_param_groups = _get_param_groups(model_chunks, config, overrides)
        self._groups = groups
        self._pg_collection = pg_collection

    def kinds(self, is_dion: bool) -> list[bool]:
        """Which of dense (False) and expert (True) parameters need an optimizer of a kind."""
        return [experts for experts in (False, True) if self._param_groups(is_dion, experts)]

    def dion(
        self,
        experts: bool,
        dion_config: DionConfig,
        grad_scaler: MegatronGradScaler | None,
        replicas: ProcessGroup | None,
        recenter_interval: int | None,
    ) -> DionDistributedOptimizer:
        tensor_group = self._pg_collection.expt_tp if experts else self._pg_collection.tp
        inner = Dion(
            self._param_groups(True, experts),
            lr=self._config.lr,
            weight_decay=self._config.weight_decay,
            **asdict(dion_config),
        )
        optimizer = DionDistributedOptimizer(
            inner,
            self._config,
            grad_scaler,
            lambda opt, config=None: opt.init_state(),
            model_chunks=self._model_chunks,
            per_model_buffers=self._buffers(True, experts),
            distributed_optimizer_instance_id=self._instance(),
            tensor_group=tensor_group,
            replicas=replicas,
            recenter_interval=recenter_interval,
            **self._data_parallel(experts),
        )
        optimizer.grad_stats_parallel_group = self._groups["intra_dist_opt_group"]
        optimizer.tp_group = self._pg_collection.tp
        optimizer.expert_tp_group = self._pg_collection.expt_tp
        return optimizer

    def scalar(self, experts: bool) -> Any:
        return _get_megatron_optimizer_based_on_param_groups(
            config=self._config,
            model_chunks=self._model_chunks,
            param_groups=self._param_groups(False, experts),
            per_model_buffers=self._buffers(False, experts),
            model_parallel_group=self._model_parallel(experts),
            intra_dist_opt_group=self._groups["intra_dist_opt_group"],
            distributed_optimizer_instance_id=self._instance(),
            pg_collection=self._pg_collection,
            **self._data_parallel(experts),
        )

    def _param_groups(self, is_dion: bool, experts: bool) -> list[dict[str, Any]]:
        return [
            group
            for group in self._all_param_groups
            if group["is_expert_parallel"] == experts
            and (group.get("optimizer") == DION) == is_dion
        ]

    def _buffers(self, is_dion: bool, experts: bool) -> dict[int, list[_ParamAndGradBuffer]]:
        name = "expert_parallel_buffers" if experts else "buffers"
        return {
            index: [
                buffer
                for buffer in getattr(chunk, name)
                if (weight_of(buffer.params[0]) is not None) == is_dion
            ]
            for index, chunk in enumerate(self._model_chunks)
        }

    def _data_parallel(self, experts: bool) -> dict[str, Any]:
        name = "intra_expt_dp_group" if experts else "intra_dp_cp_group"
        return {
            "data_parallel_group": self._groups[name],
            "data_parallel_group_gloo": self._groups[f"{name}_gloo"],
            "data_parallel_group_idx": self._model_parallel(experts).rank(),
        }

    def _model_parallel(self, experts: bool) -> Any:
        return self._groups["expt_tp_pp_with_egtp_remat_group" if experts else "mp_group"]

    def _instance(self) -> int:
        group = self._groups["inter_dist_opt_group"]
        return 0 if group is None else group.rank()
