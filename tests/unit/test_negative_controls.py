"""The comparison with the reference notices wrong code: one term is broken at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.algorithm import step
from megatron_dion.algorithm.exchange import Exchange
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
    lr: float
    decay: float

    def with_config(self, **changes: float) -> "Update":
        return replace(self, config=SimpleNamespace(**{**vars(self.config), **changes}))

    def with_block(self, **changes: Any) -> "Update":
        return replace(self, block=replace(self.block, **changes))


Change = Callable[[Update], Update]


def swap_scale(update: Update) -> Update:
    """sqrt(n / m) instead of sqrt(m / n)."""
    _, m, n = update.block.weight.shape
    return update.with_block(scale=update.block.scale * n / m)


BREAKAGES: dict[str, Change] = {
    # M = B + (1 - mu) R P^T instead of B - (1 - mu) R P^T.
    "error feedback with the wrong sign": lambda u: u.with_config(momentum=2 - u.config.momentum),
    "another momentum": lambda u: u.with_config(momentum=0.9),
    "no weight decay": lambda u: replace(u, decay=0.0),
    "weight decay by the scaled learning rate": lambda u: replace(u, decay=u.decay * u.block.scale),
    "scale with m and n swapped": swap_scale,
    "update with the wrong sign": lambda u: u.with_block(scale=-u.block.scale),
    "no column normalization": lambda u: replace(u, squares=torch.ones_like(u.squares)),
    "eps of 1": lambda u: u.with_config(eps=1.0),
}
RESIDUAL_BREAKAGES: dict[str, Change] = {
    "momentum that nothing takes from": lambda u: u.with_config(momentum=1.0),
    "rows of another length": lambda u: u.with_block(residual_row=1.001 * u.block.residual_row),
    "rows of B for rows of E": lambda u: u.with_block(row_squares=1.01 * u.block.row_squares),
}


def break_update(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    unbroken = step._update

    def update(
        blocks: Sequence[Block],
        exchange: Exchange,
        config: DionConfig,
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
    ) -> None:
        for block, lr, decay in zip(blocks, learning_rates, weight_decays, strict=True):
            (matrix,) = block.matrices
            squares, read = exchange.column_squares[matrix], SimpleNamespace(**vars(config))
            new = change(Update(block, squares, read, lr, decay))
            of_block: Any = SimpleNamespace(
                column_squares={matrix: new.squares}, has_residual=exchange.has_residual
            )
            unbroken([new.block], of_block, new.config, [new.lr], [new.decay])  # type: ignore[arg-type]

    monkeypatch.setattr(step, "_update", update)


def compare(**options: Any) -> Comparison:
    comparison = Comparison([(SHAPES, {})], scale_mode="dion", weight_decay=0.1, **options)
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
    for comparison in (compare(), compare(residual="none"), compare_after_zero_gradients()):
        comparison.assert_equal()


@pytest.mark.parametrize("change", BREAKAGES.values(), ids=BREAKAGES)
def test_broken_update_is_noticed(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    break_update(monkeypatch, change)
    assert_noticed(compare(residual="none"))


@pytest.mark.parametrize("change", RESIDUAL_BREAKAGES.values(), ids=RESIDUAL_BREAKAGES)
def test_broken_residual_is_noticed(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
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
