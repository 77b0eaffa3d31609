"""Adam and AdamW for the CPU platform, with the state layout of the fused GPU optimizers."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam


class CpuAdam(torch.optim.Optimizer):
    """Adam that counts steps in the parameter group, as Transformer Engine and apex do.

    Without those two, megatron-core 0.19.2 falls back to torch's Adam, which counts in each
    parameter's state, and then cannot load a checkpoint: distrib_optimizer.py:839 reads the step
    of a state that does not exist yet, and :1030 gives all parameters one shared step tensor.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decay rate, decoupled from the gradient where `adam_w_mode` is true.
        adam_w_mode: AdamW rather than Adam with an L2 penalty.
        capturable: For CUDA graphs; Megatron always passes it, here it has no meaning.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        del capturable
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. A closure is not supported."""
        if closure is not None:
            raise NotImplementedError("CpuAdam.step takes no closure")
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        steps_done = group.get("step", 0)
        group["step"] = steps_done + 1
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state_of(p) for p in params]
        adam(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            # The kernel adds one to these; the count that persists is the group's.
            state_steps=[torch.tensor(float(steps_done)) for _ in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self._decoupled,
        )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
