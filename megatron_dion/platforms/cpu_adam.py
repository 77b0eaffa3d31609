"""Adam and AdamW for the CPU platform, with the state layout of the fused GPU optimizers."""

from typing import Any

import torch
from torch.optim.adam import adam


class CpuAdam(torch.optim.Optimizer):
    """Adam that counts steps in the parameter group, as Transformer Engine and apex do.

    Without those two, megatron-core 0.19.2 falls back to torch's Adam, which counts in each
    parameter's state, and then cannot load a checkpoint: distrib_optimizer.py:839 reads the step
    of a state that does not exist yet, and :1030 gives all parameters one shared step tensor.

    It is AdamW with `adam_w_mode`, else Adam with an L2 penalty. `capturable`, for CUDA graphs, has
    no meaning. The defaults are lr, betas, eps and weight_decay.
    """

    def __init__(
        self, params: Any, adam_w_mode: bool = True, capturable: bool = False, **defaults: Any
    ) -> None:
        super().__init__(params, defaults)
        self._decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. A closure is not supported."""
        for group in self.param_groups:
            done = group.get("step", 0)
            group["step"] = done + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] |= {n: torch.zeros_like(p) for n in ("exp_avg", "exp_avg_sq")}
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                max_exp_avg_sqs=[],
                # The kernel adds one to these; the count that persists is the group's.
                state_steps=[torch.tensor(float(done)) for _ in params],
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
