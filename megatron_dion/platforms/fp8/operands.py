"""What a recipe does to an operand of a matrix product."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dion.platforms.fp8.scaling import (
    E4M3,
    E5M2,
    LARGEST,
    ScaleRule,
    Tiles,
    cast,
    e8m0_scale,
    float_scale,
    power_of_two_scale,
)

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")

_WHOLE = 1 << 62


class Operand(Protocol):
    """Rounds one of the three matrices of a linear layer to FP8."""

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix as a product over its columns sees it, and as one over its rows does.

        Args:
            matrix: (rows, columns).

        Returns:
            Two float32 matrices of the same shape, whose values are FP8 numbers over their scales.
        """


@dataclass(frozen=True)
class Tile:
    """Height and width of the tiles of one scale, for a product over a matrix's columns.

    For a product over its rows, the tiles are turned, and made of the unrounded values.
    """

    height: int = _WHOLE
    width: int = _WHOLE

    def over_columns(self, shape: torch.Size) -> Tiles:
        return Tiles(shape[0], shape[1], min(self.height, shape[0]), min(self.width, shape[1]))

    def over_rows(self, shape: torch.Size) -> Tiles:
        return Tile(self.width, self.height).over_columns(shape)

    @property
    def is_square(self) -> bool:
        return self.height == self.width


@dataclass(frozen=True)
class Recipe:
    """How operands are scaled.

    Attributes:
        name: Megatron's `--fp8-recipe`.
        forward: type of inputs and weights.
        backward: type of gradients.
        rule: from the largest magnitude of a tile to its scale.
        tile: of inputs and gradients.
        weight_tile: of weights.
        multiple: what all sizes of a product must be multiples of.
    """

    name: str
    forward: torch.dtype
    backward: torch.dtype
    rule: ScaleRule = float_scale
    tile: Tile = Tile()
    weight_tile: Tile = Tile()
    multiple: int = 16

    @classmethod
    def of(cls, name: str, fp8_format: str) -> "Recipe":
        """The recipe of Megatron's names, with Transformer Engine's defaults."""
        backward = E5M2 if fp8_format == "hybrid" else E4M3
        if name == "blockwise":
            tile, weight_tile = Tile(1, 128), Tile(128, 128)
            return cls(name, E4M3, backward, power_of_two_scale, tile, weight_tile)
        if name == "mxfp8":
            tile = Tile(1, 32)
            return cls(name, E4M3, backward, e8m0_scale, tile, tile, multiple=32)
        return cls(name, E4M3, backward)


def rounded(matrix: Tensor, tiles: Tiles, rule: ScaleRule, dtype: torch.dtype) -> Tensor:
    """A matrix in FP8 with the scales of its own values, and back in float32."""
    scale = tiles.spread(rule(tiles.amax(matrix), dtype))
    return cast(matrix, scale, dtype).float() * scale.reciprocal()


class CurrentScaling:
    """Scales follow from the values at hand: tensorwise, blockwise, mxfp8."""

    def __init__(self, tile: Tile, rule: ScaleRule, dtype: torch.dtype) -> None:
        self._tile = tile
        self._rule = rule
        self._dtype = dtype

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        over_columns = self._round(matrix, self._tile.over_columns(matrix.shape))
        if self._tile.is_square:
            return over_columns, over_columns
        return over_columns, self._round(matrix, self._tile.over_rows(matrix.shape))

    def _round(self, matrix: Tensor, tiles: Tiles) -> Tensor:
        return rounded(matrix, tiles, self._rule, self._dtype)


class DelayedScaling:
    """The scale follows from the largest magnitudes of earlier iterations, over all ranks.

    Args:
        dtype: of the FP8 numbers.
        history_length: number of earlier iterations.
        algorithm: `most_recent` or `max` of the history.
        margin: the scale is divided by two to this power.

    Attributes:
        counts: whether the magnitudes of operands are remembered.
        scale: float32 scalar.
        amax: largest magnitude since the last `update`, float32 scalar.
        history: the ones before, latest first.
    """

    def __init__(
        self, dtype: torch.dtype, history_length: int, algorithm: str, margin: int
    ) -> None:
        self._dtype = dtype
        self._takes_max = algorithm == "max"
        self._margin = margin
        self.counts = True
        self.scale = torch.tensor(1.0)
        self.amax = torch.tensor(0.0)
        self.history = torch.zeros(history_length)

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if self.counts:
            self.record(matrix)
        values = self.cast(matrix).float() * self.scale.reciprocal()
        return values, values

    def record(self, values: Tensor) -> None:
        """Remembers the largest magnitude."""
        torch.maximum(self.amax, values.detach().abs().max().float(), out=self.amax)

    def cast(self, values: Tensor) -> Tensor:
        """With the present scale."""
        return cast(values, self.scale, self._dtype)

    def update(self, amax: Tensor) -> None:
        """Makes the next scale.

        Args:
            amax: largest magnitude over all ranks since the last call.
        """
        self.history = self.history.roll(1, 0)
        self.history[0] = amax
        self.amax.zero_()
        largest = self.history.max() if self._takes_max else self.history[0]
        if largest > 0 and largest.isfinite():
            scale = float_scale(largest, self._dtype)
            self.scale.copy_(scale / 2**self._margin)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        largest = torch.tensor(LARGEST[self._dtype])
        return {
            "scale": self.scale,
            "amax": self.amax,
            "history": self.history,
            "largest": largest,
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave, also of another type or with another length of history."""
        self.scale.copy_(state["scale"] * (LARGEST[self._dtype] / state["largest"]))
        self.amax.copy_(state["amax"])
        common = min(len(self.history), len(state["history"]))
        self.history[:common] = state["history"][:common]
