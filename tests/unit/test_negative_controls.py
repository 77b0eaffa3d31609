"""The comparison with the reference notices wrong code: one term is broken at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion.algorithm import step
from megatron_dion.algorithm.step import Block
from tests.unit.dion_cases import Comparison

SHAPES = [(20, 6), (6, 20)]


@dataclass(frozen=True)
class Update:
    """The arguments of `step._update`."""

    block: Block
    norms: Tensor
    config: Any
    scaled_lr: float
    shrink: float


def with_config(update: Update, **changes: float) -> Update:
    """Without the checks of `DionConfig`."""
    values = {"momentum": update.config.momentum, "eps": update.config.eps, **changes}
    return replace(update, config=SimpleNamespace(**values))


def swap_scale(update: Update) -> Update:
    """sqrt(n / m) instead of sqrt(m / n)."""
    m, n = update.block.weight.shape
    return replace(update, scaled_lr=update.scaled_lr * n / m)


def flip_error_feedback(update: Update) -> Update:
    """B + (1 - mu) R P^T instead of B - (1 - mu) R P^T."""
    return with_config(update, momentum=2 - update.config.momentum)


BREAKAGES: dict[str, Callable[[Update], Update]] = {
    "error feedback with the wrong sign": flip_error_feedback,
    "another momentum": lambda update: with_config(update, momentum=0.9),
    "no column normalization": lambda update: replace(update, norms=torch.ones_like(update.norms)),
    "eps of 1": lambda update: with_config(update, eps=1.0),
    "no weight decay": lambda update: replace(update, shrink=1.0),
    "weight decay by the scaled learning rate": lambda update: replace(
        update, shrink=1 - update.scaled_lr * 0.1
    ),
    "scale with m and n swapped": swap_scale,
    "update with the wrong sign": lambda update: replace(update, scaled_lr=-update.scaled_lr),
}


def run_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[Update], Update]) -> Comparison:
    unbroken = step._update

    def update(*arguments: Any) -> None:
        changed = change(Update(*arguments))
        unbroken(changed.block, changed.norms, changed.config, changed.scaled_lr, changed.shrink)

    monkeypatch.setattr(step, "_update", update)
    comparison = Comparison([(SHAPES, {})], scale_mode="dion", weight_decay=0.1)
    comparison.run(range(3))
    return comparison


def test_unbroken_step_passes_through_the_same_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, lambda update: update).assert_equal()


@pytest.mark.parametrize("change", BREAKAGES.values(), ids=BREAKAGES.keys())
def test_broken_update_is_noticed(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Update], Update]
) -> None:
    comparison = run_with(monkeypatch, change)
    with pytest.raises(AssertionError, match=r"weight|momentum|right_factor"):
        comparison.assert_equal()


@pytest.mark.parametrize(
    "orthonormalize",
    [lambda p, *_: p, lambda p, *_: -torch.linalg.qr(p).Q.abs()],
    ids=["left factor as it is", "wrong columns"],
)
def test_broken_orthonormalization_is_noticed(
    monkeypatch: pytest.MonkeyPatch, orthonormalize: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(step, "orthonormalize", orthonormalize)
    comparison = Comparison([(SHAPES, {})])
    comparison.run(range(3))
    with pytest.raises(AssertionError, match=r"weight|momentum|right_factor"):
        comparison.assert_equal()
