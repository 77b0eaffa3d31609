"""The chain of Dion and a scalar optimizer, which steps, saves and loads as one."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.optimizer.checkpoint import Source, Transfer, count_steps, saved_steps
from megatron_dion.optimizer.diagnostics import MatrixDiagnostics
from megatron_dion.optimizer.dion import Dion
from megatron_dion.optimizer.distributed import DionDistributedOptimizer
from megatron_dion.optimizer.record import Record
from megatron_dion.optimizer.routing import RoutingTable
from megatron_dion.optimizer.rules import in_order_of_layers


class DionChainedOptimizer(ChainedOptimizer):
    """A `ChainedOptimizer` of Dion and a scalar optimizer.

    Attributes:
        routing_table: which parameter goes where, of the whole model.
        record: what checkpoints say about this run.
        exchanged_bytes_per_step: what Dion's steps send between ranks, over all ranks.
    """

    routing_table: RoutingTable
    record: Record
    exchanged_bytes_per_step: int

    def __init__(self, chained_optimizers: list[Any]) -> None:
        super().__init__(chained_optimizers)
        self._source: Source | None = None
        self._transfer: Transfer | None = None
        for optimizer in chained_optimizers:
            optimizer._defer_param_sync = True  # MC/optimizer/distrib_optimizer.py:3166

    def _step(self) -> bool:
        """As the base class; gathers updated parameters when all optimizers have stepped.

        Each optimizer of its own would gather its buckets after its step. But a bucket group may
        hold buckets of several, and Megatron's passes over groups with the tag that separates
        Dion's matrices, which it takes for the layer-wise optimizer's.
        """
        success = super()._step()
        for chunk in self.model_chunks:
            if not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()
        return success

    def _should_defer_mxfp8_param_sync(self) -> bool:
        """Never: `_step` gathers once already, and a second gather would be of what it has zeroed.

        The base class would, after `_step` (MC/optimizer/optimizer.py:1740).
        """
        return False

    def diagnose_next_step(self) -> None:
        """The next step is measured; all ranks must ask for it."""
        for dion in self._inner_dions():
            dion.diagnose_next_step()

    def gather_diagnostics(self) -> list[MatrixDiagnostics]:
        """What the last step measured of all matrices, of all pipeline stages: on the last rank.

        Elsewhere, and where no step was taken, nothing. A collective call of all ranks.
        """
        here = [found for dion in self._inner_dions() for found in dion.take_diagnostics()]
        ranks, last = dist.get_world_size(), dist.get_world_size() - 1
        everywhere: list[Any] | None = [None] * ranks if dist.get_rank() == last else None
        dist.gather_object(here, everywhere, dst=last)
        # Instances of the distributed optimizer measure the same.
        found = {matrix.name: matrix for matrices in everywhere or [] for matrix in matrices}
        return sorted(found.values(), key=lambda matrix: in_order_of_layers(matrix.name))

    def _inner_dions(self) -> list[Dion]:
        return [optimizer.optimizer for optimizer in self._dions()]

    def _dions(self) -> list[DionDistributedOptimizer]:
        return [
            optimizer
            for optimizer in self.chained_optimizers
            if isinstance(optimizer, DionDistributedOptimizer) and not optimizer.is_stub_optimizer
        ]

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Gradients for the master weights; True if one is not finite and the step is skipped.

        With a loss scale all optimizers must skip together: one scaler hears of all of them. The
        base class lets each have its own.
        """
        scaler = self.chained_optimizers[0].grad_scaler
        if scaler is None:
            return super().prepare_grads()
        found = False
        for optimizer in self.chained_optimizers:
            optimizer._copy_model_grads_to_main_grads()
            found |= optimizer._unscale_main_grads_and_check_for_nan()
        scaler.update(found)
        return found

    def load_from(self, source: Source) -> None:
        """Says what the next checkpoint to be loaded has; by default, all of this run's state."""
        self._source = source

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **_: Any
    ) -> dict[str, Any]:
        """What all ranks share, and every piece of state with its place in a whole tensor.

        The same whatever sharding type Megatron asks for: it is reshardable and needs no gather.
        The number of optimizers in the chain, which expert parallelism changes, does not show.
        """
        if not is_loading:
            for optimizer in self._dions():
                optimizer.recenter()  # the saved momentum is the mean of all replicas'
        everything = Source(self.record.rules, momentum=True, right_factors=True, scalars=True)
        source = self._source if is_loading and self._source else everything
        transfer = Transfer(self.chained_optimizers, source)
        if is_loading:
            self._transfer = transfer
        scaler = self.chained_optimizers[0].grad_scaler
        return {
            "dion": self.record.to_dict(),
            "steps": count_steps(self.chained_optimizers),
            **({"grad_scaler": scaler.state_dict()} if scaler else {}),
            "state": transfer.sharded_state(model_sharded_state_dict),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `sharded_state_dict` describes.

        Raises:
            CheckpointError: the checkpoint is of another optimizer, or of one with other factors,
                and `load_from` was not told so.
        """
        assert self._transfer is not None, "sharded_state_dict(is_loading=True) comes first"
        if self._source is None:
            self._require_same(state_dict)
        self._transfer.take(state_dict["state"], saved_steps(state_dict))
        scaler = self.chained_optimizers[0].grad_scaler
        if scaler and "grad_scaler" in state_dict:
            scaler.load_state_dict(state_dict["grad_scaler"])
        self._source = self._transfer = None

    def _require_same(self, state_dict: dict[str, Any]) -> None:
        if "dion" not in state_dict:
            raise CheckpointError("the checkpoint has no state of Dion's")
        found = Record.from_dict(state_dict["dion"]).differences(self.record)
        serious = (*found.factors, *found.routes, *found.scalars)
        if serious:
            raise CheckpointError(f"the checkpoint is of another run: {'; '.join(serious)}")
