"""The comparison with the reference notices wrong code: one term is broken at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.algorithm import Matrix, left_factor, step
from megatron_dion.algorithm.step import Block, _ToRight
from megatron_dion.optimizer import binding
from megatron_dion.sharding import Weight
from tests.unit.dion_cases import (
    Comparison,
    FusedComparison,
    assert_bitwise_equal,
)

SHAPES = [(20, 6), (6, 20)]
NOTICED = r"weight|momentum|right_factor"


@dataclass(frozen=True)
class Update:
    """The arguments of `step._update` for one block."""

    block: Block
    to_right: _ToRight
    momentum: float
    scaled_lr: float
    shrink: float


Change = Callable[[Update], Update]


def with_factor(update: Update, factor: Tensor) -> Update:
    return replace(update, to_right=replace(update.to_right, factor=factor))


def unscaled(update: Update) -> Update:
    """Q = R."""
    factor = update.to_right.factor
    return with_factor(update, torch.ones_like(factor))


def large_eps(update: Update) -> Update:
    """R / (norm + 1)."""
    factor = update.to_right.factor
    return with_factor(update, factor / (1 + factor))


def as_it_is(update: Update) -> Update:
    """Q = R, where it should be orthonormal."""
    return with_factor(update, torch.eye(len(update.to_right.factor)))


def without_alive(update: Update) -> Update:
    """Columns of R that are zero become columns of Q."""
    dead = torch.zeros_like(update.to_right.dead)
    return replace(update, to_right=replace(update.to_right, dead=dead))


def swap_scale(update: Update) -> Update:
    """sqrt(n / m) instead of sqrt(m / n)."""
    _, m, n = update.block.weight.shape
    return replace(update, scaled_lr=update.scaled_lr * n / m)


BREAKAGES: dict[str, Change] = {
    # B + (1 - mu) R P^T instead of B - (1 - mu) R P^T.
    "error feedback with the wrong sign": lambda u: replace(u, momentum=2 - u.momentum),
    "another momentum": lambda u: replace(u, momentum=0.9),
    "no weight decay": lambda u: replace(u, shrink=1.0),
    "weight decay by the scaled learning rate": lambda u: replace(u, shrink=1 - u.scaled_lr * 0.1),
    "scale with m and n swapped": swap_scale,
    "update with the wrong sign": lambda u: replace(u, scaled_lr=-u.scaled_lr),
}
OF_RIGHT_FACTORS: dict[str, dict[str, Change]] = {
    "colnorm": {"no column normalization": unscaled, "eps of 1": large_eps},
    "orth": {"R as it is": as_it_is, "C transposed": lambda u: with_factor(u, u.to_right.factor.T)},
}
CASES = [
    pytest.param(right_factor, change, id=f"{right_factor}: {name}")
    for right_factor, special in OF_RIGHT_FACTORS.items()
    for name, change in {**BREAKAGES, **special}.items()
]
every_right_factor = pytest.mark.parametrize("right_factor", OF_RIGHT_FACTORS)


def break_update(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    unbroken = step._update

    def update(
        blocks: Sequence[Block],
        to_right: Sequence[_ToRight],
        momentum: float,
        scaled_lrs: Sequence[float],
        shrinks: Sequence[float],
        precision: str,
    ) -> None:
        of_blocks = zip(blocks, to_right, scaled_lrs, shrinks, strict=True)
        for block, factor, scaled_lr, shrink in of_blocks:
            new = change(Update(block, factor, momentum, scaled_lr, shrink))
            rates = [new.scaled_lr], [new.shrink]
            unbroken([block], [new.to_right], new.momentum, *rates, precision)

    monkeypatch.setattr(step, "_update", update)


def assert_noticed(comparison: Comparison) -> None:
    with pytest.raises(AssertionError, match=NOTICED):
        comparison.assert_equal()


def run_with(monkeypatch: pytest.MonkeyPatch, right_factor: str, change: Change) -> Comparison:
    break_update(monkeypatch, change)
    comparison = Comparison(
        [(SHAPES, {})], scale_mode="dion", weight_decay=0.1, right_factor=right_factor
    )
    comparison.run(range(3))
    return comparison


@every_right_factor
def test_unbroken_step_passes_through_the_same_harness(
    monkeypatch: pytest.MonkeyPatch, right_factor: str
) -> None:
    run_with(monkeypatch, right_factor, lambda update: update).assert_equal()


@pytest.mark.parametrize(("right_factor", "change"), CASES)
def test_broken_update_is_noticed(
    monkeypatch: pytest.MonkeyPatch, right_factor: str, change: Change
) -> None:
    comparison = run_with(monkeypatch, right_factor, change)
    assert_noticed(comparison)


@pytest.mark.parametrize(
    "orthonormalize",
    [lambda p, *_: (p, 0), lambda p, *_: (-torch.linalg.qr(p).Q.abs(), 0)],
    ids=["left factor as it is", "wrong columns"],
)
def test_broken_orthonormalization_is_noticed(
    monkeypatch: pytest.MonkeyPatch, orthonormalize: Callable[..., tuple[Tensor, int]]
) -> None:
    monkeypatch.setattr(left_factor, "orthonormalize", orthonormalize)
    comparison = Comparison([(SHAPES, {})])
    comparison.run(range(3))
    assert_noticed(comparison)


def zero_then_random(right_factor: str) -> Comparison:
    comparison = Comparison([(SHAPES, {})], right_factor=right_factor)
    comparison.step({name: torch.zeros_like(p) for name, p in comparison.named.items()})
    comparison.run(range(2))
    return comparison


@every_right_factor
def test_lost_directions_of_zero_columns_are_noticed(
    monkeypatch: pytest.MonkeyPatch, right_factor: str
) -> None:
    zero_then_random(right_factor).assert_equal()
    break_update(monkeypatch, without_alive)
    comparison = zero_then_random(right_factor)
    assert_noticed(comparison)


def test_unseeded_sketch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any sketch gives the same P up to rounding; that it is the same one takes equal bits."""

    def run() -> Comparison:
        comparison = Comparison([(SHAPES, {})], orthonormalizer="rcqr")
        comparison.run(range(3))
        comparison.assert_equal()
        return comparison

    def unseeded(seed: int, purpose: str, rows: Tensor, columns: int) -> Tensor:
        return torch.randint(0, 2, (len(rows), columns)).float() * 2 - 1

    assert_bitwise_equal(run().copies(), run().copies())
    monkeypatch.setattr(left_factor, "signs", unseeded)
    one, other = run(), run()
    with pytest.raises(AssertionError, match=NOTICED):
        assert_bitwise_equal(one.copies(), other.copies())


def run_fused(right_factor: str = "colnorm") -> FusedComparison:
    comparison = FusedComparison(scale_mode="dion", rank_fraction=0.5, right_factor=right_factor)
    comparison.run(range(3))
    return comparison


@every_right_factor
def test_unbroken_fused_weight_follows_the_reference(right_factor: str) -> None:
    run_fused(right_factor).assert_equal()


def assert_fused_is_noticed() -> None:
    comparison = run_fused()
    assert_noticed(comparison)


def test_first_right_factor_by_local_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = binding.normal

    def local(seed: int, purpose: str, rows: Tensor, columns: int) -> Tensor:
        return unbroken(seed, purpose, rows - rows[0], columns)

    monkeypatch.setattr(binding, "normal", local)
    assert_fused_is_noticed()


def test_unseeded_first_right_factor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unseeded(seed: int, purpose: str, rows: Tensor, columns: int) -> Tensor:
        return torch.randn(len(rows), columns)

    monkeypatch.setattr(binding, "normal", unseeded)
    assert_fused_is_noticed()


@pytest.mark.parametrize("scale_mode", ["dion", "spectral"])
def test_scale_of_the_local_shape_is_noticed(
    monkeypatch: pytest.MonkeyPatch, scale_mode: str
) -> None:
    config = DionConfig(scale_mode=scale_mode)
    height = {0: 8, 1: 12}  # rows of the logical matrices

    def local(update: Update) -> Update:
        _, m, n = update.block.weight.shape
        ratio = config.scale(m, n) / config.scale(height[update.block.matrix], n)
        return replace(update, scaled_lr=update.scaled_lr * ratio)

    break_update(monkeypatch, local)
    comparison = FusedComparison(scale_mode=scale_mode)
    comparison.run(range(3))
    with pytest.raises(AssertionError, match="weight"):
        comparison.assert_equal()


def test_rank_of_the_local_shape_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = Weight.matrices

    def local(weight: Weight, config: DionConfig) -> list[Matrix]:
        rows = {f"{weight.name}[{part.name}]": part.rows for part in weight.parts}
        return [
            replace(m, rank=config.rank(rows[m.name], m.columns)) for m in unbroken(weight, config)
        ]

    monkeypatch.setattr(Weight, "matrices", local)
    assert_fused_is_noticed()
