"""Dion as a torch optimizer, for whole 2-D parameters or for a rank's flat pieces of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.exchange import Exchange, Matrix, Steps
from megatron_dion.algorithm.products import matmul_precision
from megatron_dion.algorithm.step import dion_step, interleave
from megatron_dion.optimizer.binding import Binding, Distribution, StepSet, gradient_of
from megatron_dion.optimizer.diagnostics import MatrixDiagnostics
from megatron_dion.sharding.collectives import TORCH_DTYPES
from megatron_dion.sharding.layout import Placement
from megatron_dion.sharding.matrices import Weight


class Dion(torch.optim.Optimizer):
    """Distributed Orthonormalized Updates (arXiv 2504.05295).

    Updates 2-D float32 parameters, each as one matrix (output x input). The state of a parameter
    (m, n) is `momentum` (m, n) and `right_factor` (m, r), where
    r = min(m, n, K ceil(rank_fraction min(m, n) / K)).

    Args:
        params: parameters, (name, parameter) pairs, or groups of them. Names seed the random
            numbers; a parameter without a name is called by its position.
        lr: learning rate, before it is scaled by shape.
        weight_decay: decoupled, multiplied by the unscaled learning rate.
        config: hyperparameters, those of `DionConfig()` by default. With `momentum_dtype="bf16"` a
            step overwrites the gradients.
        **hyperparameters: fields of `DionConfig`, such as `rank_fraction=0.25`, in place of those
            of `config`.

    Raises:
        ValueError: a hyperparameter is out of range. `bind` and the first `step` raise it for a
            parameter that is not a 2-D float32 matrix.
        TypeError: there is no such hyperparameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        config: DionConfig | None = None,
        **hyperparameters: Any,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        self.config = replace(config or DionConfig(), **hyperparameters)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self._distribution: Distribution | None = None
        self._binding: Binding | None = None
        self._is_measured = False
        self._diagnostics: list[MatrixDiagnostics] = []

    def distribute(self, distribution: Distribution) -> None:
        """From now on updates the given pieces; they are the parameters of `param_groups`."""
        self._distribution = distribution
        self._binding = None

    def bind(self) -> Binding:
        """What this rank has of all parameters; allocates the state of those that have none."""
        return self._bind(self._parameters())

    def diagnose_next_step(self) -> None:
        """The next step is measured; on a grid, all ranks must ask for it."""
        self._is_measured = True

    def take_diagnostics(self) -> list[MatrixDiagnostics]:
        """What was measured since the last call, if a step was; no other step is measured.

        On a grid each matrix is reported by every rank that holds any of it.
        """
        measured, self._diagnostics, self._is_measured = self._diagnostics, [], False
        return measured

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have gradients.

        Raises:
            FloatingPointError: a gradient is not finite; nothing has changed. (Within Megatron,
                `DionChainedOptimizer` sees to that.)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if self._distribution is None:
            if names := self.broken_gradients():
                raise FloatingPointError(f"gradient is not finite: {', '.join(names)}")
        elif len(active) < len(self._parameters()):
            raise RuntimeError("a piece of a distributed matrix has no gradient")
        binding = self._bind(active)
        binding.average_gradients()
        # Products that may be rounded to fewer bits set another precision themselves.
        with matmul_precision("highest"):
            interleave(self._step_of(binding, each) for each in binding.sets)
        self._is_measured = False
        number = self.number_of_steps + 1
        for group in self.param_groups:
            group["step"] = number
        return loss

    def broken_gradients(self) -> list[str]:
        """Names of the parameters whose gradients are not finite; the one wait for the device."""
        parameters = [parameter for parameter in self._parameters() if parameter.grad is not None]
        # A sum is one fast pass; it is not finite either where it overflows.
        sums = [gradient_of(parameter).sum() for parameter in parameters]
        if not sums or torch.stack(sums).isfinite().all():
            return []
        return [self._name(p) for p in parameters if not gradient_of(p).isfinite().all()]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group has a learning rate and a weight decay of its own, no other options.

        Raises:
            ValueError: the group has another of Dion's hyperparameters, which would be ignored.
        """
        ignored = [each.name for each in fields(self.config) if each.name in param_group]
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
            self.bind()
        now = super().state_dict()["state"]
        for index, tensors in state_dict["state"].items():
            for name, tensor in tensors.items():
                here = now[index][name].shape if index in now else None
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

    def _step_of(self, binding: Binding, step_set: StepSet) -> Steps:
        _, exchange, blocks = step_set
        binding.add_gradients(blocks)
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        groups = [group_of[id(block.parameter)] for block in blocks]
        lrs, decays = ([group[name] for group in groups] for name in ("lr", "weight_decay"))
        with exchange.allocated():
            yield from dion_step(blocks, exchange, self.config, lrs, decays, self._is_measured)
            if self._is_measured:
                pairs = zip(blocks, lrs, strict=True)
                of_matrices = {k: (block, lr) for block, lr in pairs for k in block.matrices}
                matrices = binding.layout.matrices
                self._diagnostics += [
                    self._diagnose(k, matrices[k], exchange, lr * block.scale)
                    for k, (block, lr) in of_matrices.items()
                ]

    def _diagnose(
        self, index: int, matrix: Matrix, exchange: Exchange, scaled_lr: float
    ) -> MatrixDiagnostics:
        """The norms of a matrix, from sums that a step has made.

        P is orthonormal, so ||B||^2 = ||R||^2 + ||E||^2. The new momentum is E + mu R P^T, or mu B
        with the residual. The update counts all rows of E alike, also those below the `FLOOR`.
        """
        total, squares = float(exchange.totals[index]), exchange.column_squares[index]
        norms, mu = squares.sqrt(), self.config.momentum
        projected = float(squares.sum())
        update = float((norms / (norms + self.config.eps)).square().sum())
        momentum = total - (1 - mu**2) * projected
        if exchange.has_residual:
            row = self.config.residual_row(matrix.rows, matrix.columns)
            update += matrix.rows * row**2 if total > projected else 0.0
            momentum = mu**2 * total
        return MatrixDiagnostics(
            name=matrix.name,
            rows=matrix.rows,
            columns=matrix.columns,
            rank=matrix.rank,
            captured=math.sqrt(projected / max(total, projected)) if total else None,
            update_norm=scaled_lr * math.sqrt(update),
            momentum_norm=math.sqrt(abs(momentum)),
        )

    @property
    def number_of_steps(self) -> int:
        """Steps taken so far."""
        return max(group["step"] for group in self.param_groups)

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
