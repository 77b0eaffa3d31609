"""The arithmetic of emulated FP8, against numbers written out."""

import itertools
import math

import pytest
import torch

from tests.fp8_emulation.scaling import (
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
