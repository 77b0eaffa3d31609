"""Dion as a torch optimizer, for whole 2-D parameters or for a rank's flat pieces of them."""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megatron_dion.algorithm import (
    NOBODY,
    DionConfig,
    Observer,
    dion_step,
    float32_products_in,
    interleave,
)
from megatron_dion.optimizer.binding import Binding, Distribution, HeldBlock, StepSet, gradient_of
from megatron_dion.optimizer.diagnostics import MatrixDiagnostics
from megatron_dion.optimizer.watch import Watch
from megatron_dion.sharding import TORCH_DTYPES, Placement, Planner, Weight

_DEFAULTS = DionConfig()


class Dion(torch.optim.Optimizer):
    """Distributed Orthonormalized Updates (arXiv 2504.05295).

    Updates 2-D float32 parameters, each as one matrix (output x input). The state of a parameter
    (m, n) is `momentum` (m, n) and `right_factor` (m, r), where
    r = min(m, n, K ceil(rank_fraction min(m, n) / K)).

    Args:
        params: parameters, (name, parameter) pairs, or groups of them. Names seed the random
            numbers; a parameter without a name is called by its position.
        lr: learning rate, before it is scaled by shape.
        momentum: error-feedback coefficient mu.
        weight_decay: decoupled, multiplied by the unscaled learning rate.
        rank_fraction: rank of the update as a share of the smaller side.
        rank_multiple_of: K, ranks are rounded up to a multiple of it.
        scale_mode: `dion` sqrt(m / n), `spectral` 0.2 sqrt(max(m, n)), `unit_rms_norm` sqrt(m / n).
        extra_scale_factor: multiplies the scale.
        orthonormalizer: `auto`, `rcqr`, `cqr` or `qr`.
        oversample: rows of the sketch of `rcqr` per column.
        eps: added to column norms.
        right_factor: `colnorm` (the paper) or `orth`: how R becomes Q.
        fp32_matmul_prec: `highest`, `high` (TF32 where the device has it) or `medium` (bf16), of
            the products of matrices with factors.
        momentum_dtype: `fp32` or `bf16`, of the stored momentum; with bf16 a step overwrites the
            gradients.
        factor_dtype: of the stored right factors.
        comm_dtype: of what ranks send to each other.
        exchange_buffer_mib: MiB that buffers take at most in a step: as many sets of parameters as
            that needs are stepped one after the other. None for no limit.
        seed: of the right factors' first values and the sketches.

    Attributes:
        fallbacks: how often this process had to orthonormalize by Householder QR instead.

    Raises:
        ValueError: a hyperparameter is out of range. `init_state` and the first `step` raise it for
            a parameter that is not a 2-D float32 matrix, or needs larger buffers than allowed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = _DEFAULTS.momentum,
        weight_decay: float = 0.0,
        rank_fraction: float = _DEFAULTS.rank_fraction,
        rank_multiple_of: int = _DEFAULTS.rank_multiple_of,
        scale_mode: str = _DEFAULTS.scale_mode,
        extra_scale_factor: float = _DEFAULTS.extra_scale_factor,
        orthonormalizer: str = _DEFAULTS.orthonormalizer,
        oversample: float = _DEFAULTS.oversample,
        eps: float = _DEFAULTS.eps,
        right_factor: str = _DEFAULTS.right_factor,
        fp32_matmul_prec: str = _DEFAULTS.fp32_matmul_prec,
        momentum_dtype: str = _DEFAULTS.momentum_dtype,
        factor_dtype: str = _DEFAULTS.factor_dtype,
        comm_dtype: str = _DEFAULTS.comm_dtype,
        exchange_buffer_mib: float | None = _DEFAULTS.exchange_buffer_mib,
        seed: int = _DEFAULTS.seed,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        self.config = DionConfig(
            momentum=momentum,
            rank_fraction=rank_fraction,
            rank_multiple_of=rank_multiple_of,
            scale_mode=scale_mode,
            extra_scale_factor=extra_scale_factor,
            orthonormalizer=orthonormalizer,
            oversample=oversample,
            eps=eps,
            right_factor=right_factor,
            fp32_matmul_prec=fp32_matmul_prec,
            momentum_dtype=momentum_dtype,
            factor_dtype=factor_dtype,
            comm_dtype=comm_dtype,
            exchange_buffer_mib=exchange_buffer_mib,
            seed=seed,
        )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self._distribution: Distribution | None = None
        self._binding: Binding | None = None
        self.fallbacks = 0
        self._is_watched = False
        self._diagnostics: list[MatrixDiagnostics] = []

    def distribute(self, distribution: Distribution) -> None:
        """From now on updates the given pieces; they are the parameters of `param_groups`."""
        self._distribution = distribution
        self._binding = None

    def init_state(self) -> None:
        """Allocates momentum and right factors of all parameters that have none yet."""
        self._bind(self._parameters())

    def step_sets(self) -> list[StepSet]:
        """What this rank does in a step, for each set of matrices that is stepped together."""
        return self._bind(self._parameters()).sets

    def planner(self) -> Planner:
        """Who does what in a step, on all ranks."""
        return self._bind(self._parameters()).planner

    def bytes_per_step(self) -> int:
        """Bytes that this rank sends to others in a step."""
        return self._bind(self._parameters()).bytes_per_step()

    def recenter(self) -> None:
        """Makes the momenta of replicas with compressed gradient sync equal: their mean."""
        self._bind(self._parameters()).recenter()

    def held_blocks(self) -> list[HeldBlock]:
        """Every block on this rank, with its state."""
        return self._bind(self._parameters()).held

    def diagnose_next_step(self) -> None:
        """The next step is measured; on a grid, all ranks must ask for it."""
        self._is_watched = True

    def take_diagnostics(self) -> list[MatrixDiagnostics]:
        """What was measured since the last call, if a step was; no other step is measured.

        On a grid each matrix is reported by one rank, the first in charge of its P.
        """
        found, self._diagnostics, self._is_watched = self._diagnostics, [], False
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have gradients.

        Raises:
            FloatingPointError: a gradient is not finite; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if self._distribution is None:
            self.check_gradients()
        elif len(active) < len(self._parameters()):
            raise RuntimeError("a piece of a distributed matrix has no gradient")
        binding = self._bind(active)
        number = self._count_step()
        binding.average_gradients()
        # In TF32 columns would not come out orthonormal: what may be rounded says so.
        with float32_products_in("highest"):
            self.fallbacks += interleave(
                self._step_of(binding, chosen, number) for chosen in binding.sets
            )
        self._is_watched = False
        return loss

    def check_gradients(self) -> None:
        """Raises FloatingPointError, naming the parameters, if a gradient is not finite."""
        parameters = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if not parameters:
            return
        # A sum is one fast pass; it is not finite either where it overflows.
        sums = torch.stack([gradient_of(parameter).sum() for parameter in parameters])
        if sums.isfinite().all():
            return
        broken = [p for p in parameters if not gradient_of(p).isfinite().all()]
        if broken:
            names = ", ".join(self._name(parameter) for parameter in broken)
            raise FloatingPointError(f"gradient is not finite: {names}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group has a learning rate and a weight decay of its own, no other options.

        Raises:
            ValueError: the group has another of Dion's hyperparameters, which would be ignored.
        """
        ignored = [name for name in asdict(self.config) if name in param_group]
        if ignored:
            raise ValueError(
                f"a parameter group cannot have its own {', '.join(ignored)}:"
                " use another Dion optimizer for these parameters"
            )
        super().add_param_group(param_group)
        self._binding = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: the state is of other shapes, say of another rank fraction; nothing has
                changed.
        """
        if state_dict["state"]:
            self.init_state()
        now = super().state_dict()
        for index, tensors in state_dict["state"].items():
            for name, tensor in tensors.items():
                here = now["state"][index][name].shape if index in now["state"] else None
                if tensor.shape != here:
                    raise ValueError(
                        f"the saved {name} of parameter {index} is {tuple(tensor.shape)}, here it"
                        f" is {here and tuple(here)}: was it saved with another rank_fraction?"
                    )
        super().load_state_dict(state_dict)
        # torch makes the dtype of states that of their parameters.
        for state in self.state.values():
            state["momentum"] = state["momentum"].to(TORCH_DTYPES[self.config.momentum_dtype])
            state["right_factor"] = state["right_factor"].to(TORCH_DTYPES[self.config.factor_dtype])
        self._binding = None

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _step_of(
        self, binding: Binding, chosen: StepSet, number: int
    ) -> Generator[None, None, int]:
        binding.add_gradients(chosen)
        take = self._take_watched_step if self._is_watched else self._take_step
        return (yield from take(chosen, number))

    def _take_watched_step(self, chosen: StepSet, number: int) -> Generator[None, None, int]:
        watch = Watch(chosen, self.config)
        with watch.allocated():
            watch.see_totals([group["lr"] for group in self._groups_of(chosen)])
            fallbacks = yield from self._take_step(chosen, number, watch)
            watch.see_momenta()
            self._diagnostics += yield from watch.results()
        return fallbacks

    def _take_step(
        self, chosen: StepSet, number: int, observer: Observer = NOBODY
    ) -> Generator[None, None, int]:
        groups = self._groups_of(chosen)
        with chosen.exchange.allocated():
            return (
                yield from dion_step(
                    chosen.plan.matrices,
                    [block.tensors for block in chosen.stepped],
                    chosen.exchange,
                    self.config,
                    number,
                    [group["lr"] for group in groups],
                    [group["weight_decay"] for group in groups],
                    observer,
                )
            )

    def _groups_of(self, chosen: StepSet) -> list[dict[str, Any]]:
        """The parameter group of each block that is stepped."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        return [groups[id(block.parameter)] for block in chosen.stepped]

    @property
    def number_of_steps(self) -> int:
        """Steps taken so far."""
        return max(group["step"] for group in self.param_groups)

    def _count_step(self) -> int:
        number = self.number_of_steps + 1
        for group in self.param_groups:
            group["step"] = number
        return number

    def _name(self, parameter: Tensor) -> str:
        if self._distribution is not None:
            for index, tensor in self._distribution.tensors.items():
                if tensor is parameter:
                    return self._distribution.placements[index].weight.name
        names = [
            name
            for group in self.param_groups
            for name in group.get("param_names", [None] * len(group["params"]))
        ]
        position = next(i for i, p in enumerate(self._parameters()) if p is parameter)
        return names[position] or f"parameter.{position}"

    def _whole(self, parameters: Sequence[Tensor]) -> Distribution:
        """Unsharded parameters: the grid of one rank."""
        placements: list[Placement] = []
        for parameter in parameters:
            name = self._name(parameter)
            if parameter.dim() != 2 or parameter.dtype != torch.float32:
                raise ValueError(
                    f"Dion updates 2-D float32 matrices; {name} is"
                    f" {tuple(parameter.shape)} {parameter.dtype}: give it to another optimizer"
                )
            if not parameter.is_contiguous() or not parameter.numel():
                raise ValueError(f"Dion updates contiguous parameters; {name} is empty or strided")
            if name in {placement.weight.name for placement in placements}:
                raise ValueError(f"two parameters are called {name}: names seed random numbers")
            weight = Weight(name, *parameter.shape)
            placements.append(Placement(weight, start=0, bucket_numel=parameter.numel()))
        device = parameters[0].device if parameters else torch.device("cpu")
        return Distribution(placements, dict(enumerate(parameters)), device)

    def _bind(self, active: Sequence[Tensor]) -> Binding:
        """The blocks of the given parameters, kept until others are asked for."""
        if self._binding is None or not self._binding.is_of(active):
            distribution = self._distribution or self._whole(active)
            self._binding = Binding(active, distribution, self.config, self.state)
        return self._binding
