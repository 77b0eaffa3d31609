"""The arithmetic of emulated FP8, against numbers written out and torch's own FP8 product."""

import itertools
import math

import pytest
import torch

from megatron_dion.platforms.fp8.operands import RECIPES, CurrentScaling, DelayedScaling, Recipe
from megatron_dion.platforms.fp8.scaling import (
    E4M3,
    E5M2,
    Tiles,
    cast,
    e8m0_scale,
    float_scale,
    power_of_two_scale,
)


def scale(rule: object, amax: float, dtype: torch.dtype = E4M3) -> float:
    return float(rule(torch.tensor([amax]), dtype))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("amax", "dtype", "expected"),
    [
        (448.0, E4M3, 1.0),
        (2.0, E4M3, 224.0),
        (2.0, E5M2, 28672.0),
        (0.0, E4M3, 1.0),
        (math.inf, E4M3, 1.0),
        (math.nan, E4M3, 1.0),
        (1e-44, E4M3, torch.finfo(torch.float32).max),
    ],
)
def test_float_scale(amax: float, dtype: torch.dtype, expected: float) -> None:
    assert scale(float_scale, amax, dtype) == expected


@pytest.mark.parametrize(
    ("amax", "expected"), [(448.0, 1.0), (449.0, 0.5), (447.0, 1.0), (2.0, 128.0), (0.0, 1.0)]
)
def test_power_of_two_scale(amax: float, expected: float) -> None:
    assert scale(power_of_two_scale, amax) == expected


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        (448.0, 1.0),
        (450.0, 0.5),
        (224.0, 2.0),
        (225.0, 1.0),
        (0.0, 2.0**127),
        (math.inf, 2.0**-127),
    ],
)
def test_e8m0_scale(amax: float, expected: float) -> None:
    assert scale(e8m0_scale, amax) == expected


def test_cast_saturates_and_keeps_nan() -> None:
    values = torch.tensor([1.0, -1e30, math.inf, math.nan, 0.0])
    for dtype, largest in ((E4M3, 448.0), (E5M2, 57344.0)):
        found = cast(values, torch.tensor(2.0), dtype).float()
        assert found[:3].tolist() == [2.0, -largest, largest]
        assert found[3].isnan()
        assert found[4] == 0


@pytest.mark.parametrize("shape", [(256, 128), (130, 260), (1, 1), (3, 129), (128, 127)])
@pytest.mark.parametrize("tile", [(128, 128), (1, 128), (128, 1), (1, 32), (10**6, 10**6)])
def test_pieces_know_the_largest_magnitudes_together(
    shape: tuple[int, int], tile: tuple[int, int]
) -> None:
    tiles = Tiles(*shape, min(tile[0], shape[0]), min(tile[1], shape[1]))
    matrix = torch.randn(shape)
    whole = tiles.amax(matrix)
    spread = tiles.spread(whole).expand(shape)
    height, width = tiles.height, tiles.width
    for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)):
        i, j = row // height * height, column // width * width
        assert spread[row, column] == matrix[i : i + height, j : j + width].abs().max()
    flat = matrix.flatten()
    cuts = sorted({0, len(flat) // 3, 2 * len(flat) // 3 + 1, len(flat)})
    pieces = [
        tiles.amax_of_piece(flat[start:stop], start) for start, stop in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.stack(pieces).amax(0), whole)
    of_elements = whole.flatten()[tiles.of_elements(0, len(flat))]
    assert torch.equal(of_elements.view(shape), spread)


def test_tensorwise_product_is_torch_own() -> None:
    recipe = Recipe.of("tensorwise", "hybrid")
    x, weight = torch.randn(32, 64), torch.randn(48, 64)
    operand = CurrentScaling(recipe.tile, recipe.rule, recipe.forward)
    scales = [float_scale(matrix.abs().max(), E4M3) for matrix in (x, weight)]
    product = torch._scaled_mm(
        cast(x, scales[0], E4M3), cast(weight, scales[1], E4M3).T,
        scale_a=scales[0].reciprocal(), scale_b=scales[1].reciprocal(), out_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(operand(x)[0] @ operand(weight)[0].T, product, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES[1:])
def test_rounding_is_no_coarser_than_fp8(name: str) -> None:
    recipe = Recipe.of(name, "e4m3")
    # Rows and columns of very different sizes, which one scale for all loses.
    matrix = torch.randn(64, 96) * torch.logspace(-4, 4, 64).unsqueeze(1)
    over_columns, over_rows = CurrentScaling(recipe.tile, recipe.rule, E4M3)(matrix)
    errors = (over_columns - matrix).norm(dim=1) / matrix.norm(dim=1)
    if name == "tensorwise":
        assert errors.max() > 0.5
        assert over_columns is over_rows
    else:
        assert errors.max() < 0.04
        assert not torch.equal(over_columns, over_rows)
    turned, _ = CurrentScaling(recipe.tile, recipe.rule, E4M3)(matrix.T.contiguous())
    assert torch.equal(turned.T, over_rows)


def test_gradients_are_in_e5m2_with_hybrid() -> None:
    assert Recipe.of("tensorwise", "hybrid").backward == E5M2
    assert Recipe.of("tensorwise", "e4m3").backward == E4M3


@pytest.mark.parametrize(("algorithm", "expected"), [("most_recent", 448 / 2), ("max", 448 / 8)])
def test_delayed_scale_follows_the_history(algorithm: str, expected: float) -> None:
    scaling = DelayedScaling(E4M3, history_length=2, algorithm=algorithm, margin=1)
    for largest in (4.0, 8.0, 2.0):
        scaling(torch.tensor([[-largest, 0.5]]))
        assert scaling.amax == largest
        scaling.update(scaling.amax.clone())
    assert scaling.scale == expected / 2
    assert scaling.amax == 0
    scaling.update(torch.tensor(0.0))
    scaling.update(torch.tensor(0.0))
    assert scaling.scale == 448 / 2 / 2  # nothing was seen: it stays


def test_delayed_state_comes_back() -> None:
    scaling = DelayedScaling(E4M3, 3, "max", 0)
    scaling(torch.tensor([[3.0]]))
    scaling.update(torch.tensor(5.0))
    other = DelayedScaling(E4M3, 2, "max", 0)
    other.load_state(scaling.state())
    assert other.scale == scaling.scale
    assert other.history.tolist() == [5.0, 0.0]


def test_delayed_scales_fit_another_type() -> None:
    scaling = DelayedScaling(E5M2, 1, "most_recent", 0)
    scaling.update(torch.tensor(4.0))
    other = DelayedScaling(E4M3, 1, "most_recent", 0)
    other.load_state(scaling.state())
    assert other.scale == 448 / 4


def test_what_does_not_count_leaves_no_trace() -> None:
    scaling = DelayedScaling(E4M3, 1, "max", 0)
    scaling.counts = False
    scaling(torch.tensor([[3.0]]))
    assert scaling.amax == 0
