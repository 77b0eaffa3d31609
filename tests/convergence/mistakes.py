"""Mistakes that cases must notice; each function breaks Dion in the process that calls it."""

from typing import Any

import torch

from megatron_dion.algorithm import step
from megatron_dion.optimizer.checkpoint import MOMENTUM, Transfer


def swap_sign_of_error_feedback() -> None:
    """M = B + (1 - mu) R P^T in place of M = B - (1 - mu) R P^T."""
    update = step._update

    def wrong(blocks: Any, to_right: Any, momentum: float, *rest: Any) -> None:
        update(blocks, to_right, 2 - momentum, *rest)

    step._update = wrong


def freeze_one_matrix() -> None:
    """The first matrix keeps its weights; nothing else is touched."""
    update = step._update

    def wrong(blocks: Any, *arguments: Any) -> None:
        weights = [block.weight for block in blocks if block.matrix == 0]
        before = [weight.clone() for weight in weights]
        update(blocks, *arguments)
        for weight, kept in zip(weights, before, strict=True):
            weight.copy_(kept)

    step._update = wrong


def lose_momentum_on_resume() -> None:
    """What a checkpoint has as momentum is taken for zeros."""
    take = Transfer.take

    def wrong(self: Transfer, loaded: dict[str, torch.Tensor], *rest: Any) -> None:
        lost = {name: torch.zeros_like(t) for name, t in loaded.items() if MOMENTUM in name}
        assert lost, "no momentum among what was loaded"
        take(self, loaded | lost, *rest)

    Transfer.take = wrong
