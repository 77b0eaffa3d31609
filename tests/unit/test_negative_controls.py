"""The comparison with the reference notices wrong code: one term is broken at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.algorithm import step
from megatron_dion.algorithm.step import Block
from megatron_dion.optimizer import binding
from tests.unit.dion_cases import Comparison

SHAPES = [(20, 6), (6, 20)]
NOTICED = r"weight|momentum|right_factor"


@dataclass(frozen=True)
class Update:
    """The arguments of `step._update` for one block; `config` has what the update reads."""

    block: Block
    squares: Tensor
    config: SimpleNamespace
    scaled_lr: float
    shrink: float

    def with_config(self, **changes: float) -> "Update":
        return replace(self, config=SimpleNamespace(**{**vars(self.config), **changes}))


Change = Callable[[Update], Update]


def swap_scale(update: Update) -> Update:
    """sqrt(n / m) instead of sqrt(m / n)."""
    _, m, n = update.block.weight.shape
    return replace(update, scaled_lr=update.scaled_lr * n / m)


BREAKAGES: dict[str, Change] = {
    # M = B + (1 - mu) R P^T instead of B - (1 - mu) R P^T.
    "error feedback with the wrong sign": lambda u: u.with_config(momentum=2 - u.config.momentum),
    "another momentum": lambda u: u.with_config(momentum=0.9),
    "no weight decay": lambda u: replace(u, shrink=1.0),
    "weight decay by the scaled learning rate": lambda u: replace(u, shrink=1 - u.scaled_lr * 0.1),
    "scale with m and n swapped": swap_scale,
    "update with the wrong sign": lambda u: replace(u, scaled_lr=-u.scaled_lr),
    "no column normalization": lambda u: replace(u, squares=torch.ones_like(u.squares)),
    "eps of 1": lambda u: u.with_config(eps=1.0),
}


def break_update(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    unbroken = step._update

    def update(
        blocks: Sequence[Block],
        squares: Mapping[int, Tensor],
        config: DionConfig,
        scaled_lrs: Sequence[float],
        shrinks: Sequence[float],
    ) -> None:
        for block, scaled_lr, shrink in zip(blocks, scaled_lrs, shrinks, strict=True):
            read = SimpleNamespace(**vars(config))
            new = change(Update(block, squares[block.matrix], read, scaled_lr, shrink))
            of_block: Any = {block.matrix: new.squares}, new.config
            unbroken([block], *of_block, [new.scaled_lr], [new.shrink])

    monkeypatch.setattr(step, "_update", update)


def compare() -> Comparison:
    comparison = Comparison([(SHAPES, {})], scale_mode="dion", weight_decay=0.1)
    comparison.run(range(3))
    return comparison


def compare_after_zero_gradients() -> Comparison:
    comparison = Comparison([(SHAPES, {})])
    comparison.step({name: torch.zeros_like(p) for name, p in comparison.named.items()})
    comparison.run(range(2))
    return comparison


def assert_noticed(comparison: Comparison) -> None:
    with pytest.raises(AssertionError, match=NOTICED):
        comparison.assert_equal()


def test_what_is_not_broken_passes_through_the_same_harness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_update(monkeypatch, lambda update: update)
    for comparison in (compare(), compare_after_zero_gradients()):
        comparison.assert_equal()


@pytest.mark.parametrize("change", BREAKAGES.values(), ids=BREAKAGES)
def test_broken_update_is_noticed(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    break_update(monkeypatch, change)
    assert_noticed(compare())


def test_lost_directions_of_zero_columns_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of R that is zero must leave its column of Q; here it becomes that column."""
    least = torch.finfo(torch.float64).tiny
    break_update(monkeypatch, lambda u: replace(u, squares=u.squares.clamp(min=least)))
    assert_noticed(compare_after_zero_gradients())


def wrong_columns(batches: Sequence[Tensor], sums: object) -> None:
    for p in batches:
        p.copy_(-torch.linalg.qr(p).Q.abs())


@pytest.mark.parametrize("orthonormalize", [lambda *_: None, wrong_columns], ids=["not", "wrongly"])
def test_broken_orthonormalization_is_noticed(
    monkeypatch: pytest.MonkeyPatch, orthonormalize: Callable[..., None]
) -> None:
    monkeypatch.setattr(step, "orthonormalize", orthonormalize)
    assert_noticed(compare())


def test_another_first_right_factor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "normal", lambda seed, name, rows, r: torch.randn(len(rows), r))
    assert_noticed(compare())
