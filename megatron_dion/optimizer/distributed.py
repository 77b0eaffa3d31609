"""Megatron's distributed optimizer, with Dion on the shards of its buffers."""

from typing import Any
from unittest import mock

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_dion.optimizer.binding import Distribution
from megatron_dion.optimizer.dion import Dion
from megatron_dion.optimizer.norm_estimate import projected_mean
from megatron_dion.optimizer.routing import weight_of
from megatron_dion.sharding.collectives import Groups
from megatron_dion.sharding.layout import Placement


class DionDistributedOptimizer(DistributedOptimizer):
    """A `DistributedOptimizer` whose inner optimizer is `Dion`.

    Buffers, layout, master weights, gradient norm, clipping and parameter gather are Megatron's.
    Dion takes the flat float32 shards as they lie and needs to know only which rows they are.

    Args:
        tensor_group: tensor-parallel group of the matrices.
        replicas: with compressed gradient sync, the ranks that hold the same pieces in all
            instances of the distributed optimizer.
        recenter_interval: steps after which the replicas' momenta are replaced by their mean.
        *args, **kwargs: as for `DistributedOptimizer`.
    """

    def __init__(
        self,
        *args: Any,
        tensor_group: ProcessGroup,
        replicas: ProcessGroup | None = None,
        recenter_interval: int | None = None,
        **kwargs: Any,
    ) -> None:
        # 0.18 asserts that the optimizer is an Adam (distrib_optimizer.py:665); later releases take
        # any with an init_state_fn.
        accepted = (distrib_optimizer.Adam, Dion)
        with mock.patch.object(distrib_optimizer, "Adam", accepted):
            super().__init__(*args, **kwargs)
        self._replicas = replicas
        self._recenter_interval = recenter_interval
        self.exchanged_bytes_per_step = 0
        if self.is_stub_optimizer:
            return
        self._dion: Dion = self.optimizer
        self._dion.distribute(self._distribution(tensor_group))
        self.exchanged_bytes_per_step = self._dion.bind().bytes_per_step()

    def _distribution(self, tensor_group: ProcessGroup) -> Distribution:
        """All of Dion's weights in these buffers, in the order that all ranks share."""
        shards = self._shards()
        placements: list[Placement] = []
        tensors: dict[int, Tensor] = {}
        for buffer in self.buffers:
            for parameter, (start, _, bucket) in buffer.param_index_map.items():
                if parameter in shards:
                    tensors[len(placements)] = shards[parameter]
                placements.append(_placement(buffer, parameter, start, bucket))
        device = torch.device(torch.cuda.current_device())
        groups = Groups(tensor_group, self.data_parallel_group, self._replicas)
        return Distribution(placements, tensors, device, groups, self._gradient_scale)

    @property
    def _gradient_scale(self) -> float:
        """Factor on gradients with which their mean over replicas is the gradient of the batch."""
        if self._replicas is None or self.ddp_config.average_in_collective:
            return 1.0
        return float(self._replicas.size())  # they are parts of a sum

    def _shards(self) -> dict[Parameter, Tensor]:
        """Each parameter's flat float32 piece on this rank."""
        models = [*self.model_fp32_groups, *self.model_float16_groups]
        shards = [*self.shard_fp32_groups, *self.shard_fp32_from_float16_groups]
        return {
            parameter: shard
            for model_group, shard_group in zip(models, shards, strict=True)
            for parameter, shard in zip(model_group, shard_group, strict=True)
        }

    def _unscale_main_grads_and_check_for_nan(self) -> bool:
        """As the base class; no replica may skip a step alone."""
        found_inf = super()._unscale_main_grads_and_check_for_nan()
        if self._replicas is None:
            return found_inf
        torch.distributed.all_reduce(
            self.found_inf, torch.distributed.ReduceOp.MAX, group=self._replicas
        )
        return bool(self.found_inf.item() > 0)

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[Tensor]:
        """Tensors with the norm of the gradients; with replicas, a projection of their mean."""
        gradients = super().get_grads_for_grad_norm(grad_norm_group)
        return gradients if grad_norm_group is not None else self._mean_over_replicas(gradients)

    def get_main_grads_for_grad_norm(self) -> list[Tensor]:
        """The same by its name in megatron-core 0.18."""
        return self._mean_over_replicas(super().get_main_grads_for_grad_norm())

    def _mean_over_replicas(self, gradients: list[Tensor]) -> list[Tensor]:
        if self._replicas is None or self.is_stub_optimizer:
            return gradients
        seed, step = self._dion.config.seed, self._dion.number_of_steps
        return [projected_mean(gradients, self._replicas, self._gradient_scale, seed, step)]

    def step_with_ready_grads(self) -> bool:
        """As the base class; from time to time makes the momenta of replicas equal."""
        success = super().step_with_ready_grads()
        interval = self._recenter_interval
        if not self.is_stub_optimizer and interval and self._dion.number_of_steps % interval == 0:
            self._dion.bind().recenter()
        return success


def _placement(
    buffer: _ParamAndGradBuffer, parameter: Parameter, start: int, bucket_id: int
) -> Placement:
    weight = weight_of(parameter)
    assert weight is not None, "a parameter of another optimizer lies in one of Dion's buffers"
    bucket = buffer.buckets[bucket_id]
    return Placement(weight, start - bucket.offset, bucket.grad_data.numel())
