"""The chain of Dion and a scalar optimizer, which steps, saves and loads as one."""

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_dion.checkpointing.agreement import gather
from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.optimizer.checkpoint import Loading, Source, sharded_state
from megatron_dion.optimizer.diagnostics import MatrixDiagnostics
from megatron_dion.optimizer.distributed import DionDistributedOptimizer
from megatron_dion.optimizer.record import Record
from megatron_dion.optimizer.routing import Route, RoutingTable, routes_by_rules
from megatron_dion.optimizer.rules import in_order_of_layers


class DionChainedOptimizer(ChainedOptimizer):
    """A `ChainedOptimizer` of Dion and a scalar optimizer, all of which have parameters.

    Attributes:
        routing_table: which parameter goes where, of the whole model.
        record: what checkpoints say about this run.
        exchanged_bytes_per_step: bytes that all ranks together send in a step of Dion.
        steps: how many the state of Dion (`dion`) and of the scalar optimizer (`scalar`) has seen.
    """

    def __init__(self, optimizers: list[Any], table: RoutingTable, record: Record) -> None:
        super().__init__(optimizers)
        self.routing_table, self.record = table, record
        self.steps = {"dion": 0, "scalar": 0}
        self._dions = [one for one in optimizers if isinstance(one, DionDistributedOptimizer)]
        sent = torch.tensor([sum(d.exchanged_bytes_per_step for d in self._dions)], device="cuda")
        dist.all_reduce(sent)
        self.exchanged_bytes_per_step = int(sent.item())
        for optimizer in optimizers:
            optimizer._defer_param_sync = True  # MC/optimizer/distrib_optimizer.py:3166

    def _step(self) -> bool:
        """As the base class; gathers updated parameters when all optimizers have stepped.

        A bucket group may hold buckets of several, and Megatron's own gather after each step
        passes over groups with the tag of Dion's matrices, which it takes for another optimizer's.
        """
        success = super()._step()
        self.steps = {kind: number + 1 for kind, number in self.steps.items()}
        for chunk in self.model_chunks:
            if not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()
        return success

    def _should_defer_mxfp8_param_sync(self) -> bool:
        """Never: `_step` gathers already, and a second gather would be of what it has zeroed."""
        return False

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Gradients for the master weights; True if one is not finite and the step is skipped.

        With a loss scale all optimizers must skip together: one scaler hears of all of them.
        """
        scaler = self.chained_optimizers[0].grad_scaler
        if scaler is None:
            return super().prepare_grads()
        found_inf = False
        for optimizer in self.chained_optimizers:
            optimizer._copy_model_grads_to_main_grads()
            found_inf |= optimizer._unscale_main_grads_and_check_for_nan()
        scaler.update(found_inf)
        return found_inf

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """As the base class; without a loss scaler a norm that is not finite is an error.

        The host of every rank knows the norm, so all ranks raise, without a pass over gradients
        that are finite. `--no-check-for-nan-in-loss-and-grad` turns off Megatron's own check only.
        A step that `grad_norm_skip_threshold` skips is no error.

        Raises:
            FloatingPointError: names the parameters; nothing has changed.
        """
        norm: float = super().get_grad_norm()
        is_skipped = norm > self.config.grad_norm_skip_threshold
        has_scaler = self.chained_optimizers[0].grad_scaler is not None
        if math.isfinite(norm) or is_skipped or has_scaler:
            return norm
        routes = (routes_by_rules(chunk, self.record.rules) for chunk in self.model_chunks)
        parameters: Iterable[tuple[Any, Route]] = chain.from_iterable(routes)
        broken = [r.parameter for p, r in parameters if not p.main_grad.isfinite().all()]
        names = sorted(set(gather(broken)), key=in_order_of_layers)
        named = ", ".join(names) or f"the norm of all together is {norm}"
        raise FloatingPointError(f"gradient is not finite: {named}")

    def diagnose_next_step(self) -> None:
        """The next step is measured; all ranks must ask for it."""
        for one in self._dions:
            one.optimizer.diagnose_next_step()

    def gather_diagnostics(self) -> list[MatrixDiagnostics]:
        """On the last rank, what the last step measured of the matrices of all pipeline stages.

        Other ranks get nothing, nor does any after a skipped step. A collective call of all ranks.
        """
        here = [matrix for one in self._dions for matrix in one.optimizer.take_diagnostics()]
        ranks, rank = dist.get_world_size(), dist.get_rank()
        everywhere: list[Any] | None = [None] * ranks if rank == ranks - 1 else None
        dist.gather_object(here, everywhere, dst=ranks - 1)
        # With compressed sync, instances measure about the same: one of them counts.
        by_name = {matrix.name: matrix for matrices in everywhere or [] for matrix in matrices}
        return sorted(by_name.values(), key=lambda matrix: in_order_of_layers(matrix.name))

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **_: Any
    ) -> dict[str, Any]:
        """What all ranks share, and every piece of state with its place in a whole tensor.

        The same for every sharding type of Megatron's, and for any number of chained optimizers.
        """
        source = Source(self.record.rules)
        if is_loading:
            self._loading = Loading(self, source)
            return self._loading.sharded_state_dict(model_sharded_state_dict)
        for one in self._dions:
            one.optimizer.bind().recenter()  # the saved momentum is the mean of all replicas'
        scaler = self.chained_optimizers[0].grad_scaler
        return {
            "dion": self.record.to_dict(),
            "steps": self.steps,
            **({"grad_scaler": scaler.state_dict()} if scaler else {}),
            "state": sharded_state(self.chained_optimizers, source, model_sharded_state_dict),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `sharded_state_dict(is_loading=True)` describes.

        Raises:
            CheckpointError: the checkpoint is of another run; `Loading` takes a part of such a one.
        """
        saved = Record.of_state(state_dict)
        if saved is None:
            raise CheckpointError("the checkpoint has no state of Dion's")
        factors, routes, scalars, *_ = saved.differences(self.record).values()
        if serious := "; ".join(filter(None, (factors, routes, scalars))):
            raise CheckpointError(f"the checkpoint is of another run: {serious}")
        self._loading.load_state_dict(state_dict)
