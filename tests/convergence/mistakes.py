"""Mistakes that cases must notice; each function breaks Dion in the process that calls it."""

from types import SimpleNamespace
from typing import Any

import torch

from megatron_dion.algorithm import step
from megatron_dion.optimizer.checkpoint import MOMENTUM, Loading


def swap_sign_of_error_feedback() -> None:
    """M = B + (1 - mu) R P^T in place of M = B - (1 - mu) R P^T."""
    update = step._update

    def wrong(blocks: Any, squares: Any, config: Any, *rest: Any) -> None:
        opposite = SimpleNamespace(**{**vars(config), "momentum": 2 - config.momentum})
        update(blocks, squares, opposite, *rest)  # type: ignore[arg-type]

    step._update = wrong


def freeze_one_matrix() -> None:
    """The first matrix keeps its weights; everything else is right."""
    update = step._update

    def wrong(blocks: Any, *arguments: Any) -> None:
        weights = [block.weight for block in blocks if 0 in block.matrices]
        before = [weight.clone() for weight in weights]
        update(blocks, *arguments)
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)

    step._update = wrong


def lose_momentum_on_resume() -> None:
    """The momentum of a checkpoint is taken for zeros."""
    load = Loading.load_state_dict

    def wrong(self: Loading, saved: dict[str, Any]) -> None:
        state = saved["state"]
        lost = {name: torch.zeros_like(t) for name, t in state.items() if MOMENTUM in name}
        assert lost, "no momentum in the checkpoint"
        load(self, saved | {"state": state | lost})

    Loading.load_state_dict = wrong  # type: ignore[method-assign]
