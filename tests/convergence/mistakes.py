"""Mistakes that cases must notice; each function breaks Dion in the process that calls it."""

from typing import Any

from megatron_dion.algorithm import step


def swap_sign_of_error_feedback() -> None:
    """M = B + (1 - mu) R P^T in place of M = B - (1 - mu) R P^T."""
    update = step._update

    def wrong(block: Any, to_right: Any, momentum: float, *rest: Any) -> None:
        update(block, to_right, 2 - momentum, *rest)

    step._update = wrong


def freeze_one_matrix() -> None:
    """The first matrix keeps its weights; nothing else is touched."""
    update = step._update

    def wrong(block: Any, *arguments: Any) -> None:
        weight = block.weight.clone()
        update(block, *arguments)
        if block.matrix == 0:
            block.weight.copy_(weight)

    step._update = wrong
