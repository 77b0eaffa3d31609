"""FP8 numbers (e4m3) and their scales, computed as Transformer Engine computes them. Torch only.

A value is multiplied by a scale and cast to eight bits; `scale_inv` is what leads back.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

LARGEST = 448.0
Form = tuple[Tensor, Tensor]  # bytes (rows, columns), and the scale_inv of each tile
ScaleRule = Callable[[Tensor], Tensor]


def float_scale(amax: Tensor) -> Tensor:
    """The scales that make the largest values the largest FP8 number; 1 where they are zero.

    See compute_scale_from_amax in Transformer Engine's common/recipe/recipe_common.cuh.
    """
    # Not `448 / amax`, which torch makes the reciprocal times 448.
    scale = torch.full_like(amax, LARGEST) / amax
    return torch.where(amax > 0, scale.clamp(max=torch.finfo(torch.float32).max), 1.0)


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The largest powers of two that are not above `float_scale`: its bits without the mantissa."""
    bits = float_scale(amax).view(torch.int32) & -0x0080_0000
    return bits.view(torch.float32)


def e8m0_scale(amax: Tensor) -> Tensor:
    """The scales whose inverses are E8M0 numbers: amax / largest, rounded up to powers of two.

    OCP Microscaling Formats 1.0, section 5.4 and 6.3, with Transformer Engine's rounding up
    (float_to_e8m0 in its common/util/ptx.cuh).
    """
    bits = (amax * (1.0 / LARGEST)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x007F_FFFF
    exponent = exponent + (mantissa > 0).int()
    return torch.ldexp(torch.ones_like(amax), 127 - exponent)


def cast(values: Tensor, scale: Tensor) -> Tensor:
    """The bytes of values times scale; what is too large becomes the largest number."""
    scaled = (values.float() * scale).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


class Tiles(NamedTuple):
    """Tiles of `height` x `width` of a matrix that have one scale each; the last may be smaller."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def counts(self) -> tuple[int, int]:
        """Number of tiles below one another and side by side."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    def amax(self, matrix: Tensor) -> Tensor:
        """The largest magnitude in each tile of a matrix, of shape `counts`."""
        down, across = self.counts
        missing = (0, across * self.width - self.columns, 0, down * self.height - self.rows)
        whole = pad(matrix.float().abs(), missing)
        return whole.view(down, self.height, across, self.width).amax(dim=(1, 3))

    def spread(self, scales: Tensor) -> Tensor:
        """The scale (rows, columns) of each element, from those of the tiles."""
        tall = scales.repeat_interleave(self.height, dim=0)[: self.rows]
        return tall.repeat_interleave(self.width, dim=1)[:, : self.columns]

    def of_elements(self, start: int, stop: int) -> Tensor:
        """The tile, of all in one row, of each of some elements of the flattened matrix."""
        element = torch.arange(start, stop)
        row, column = element // self.columns, element % self.columns
        return row // self.height * self.counts[1] + column // self.width  # (stop - start,)

    def amax_of_piece(self, piece: Tensor, start: int) -> Tensor:
        """The largest magnitude in each tile of a piece of the flattened matrix; 0 elsewhere."""
        down, across = self.counts
        found = torch.zeros(down * across)
        tiles = self.of_elements(start, start + piece.numel())
        return found.scatter_reduce_(0, tiles, piece.float().abs(), "amax").view(down, across)


_RULES = {"blockwise": power_of_two_scale, "mxfp8": e8m0_scale}


def tiles_of(recipe: str, shape: torch.Size) -> list[Tiles]:
    """The tiles for products over columns; of mxfp8, those for products over rows too."""
    if recipe == "mxfp8":
        return [Tiles(*shape, 1, 32), Tiles(*shape, 32, 1)]
    return [Tiles(*shape, 128, 128) if recipe == "blockwise" else Tiles(*shape, *shape)]


def forms(recipe: str, weight: Tensor, amax: Tensor | None = None) -> list[Form]:
    """Both forms of a whole weight; `amax` is the magnitude that delayed scaling knows of it."""
    found = []
    for tiles in tiles_of(recipe, weight.shape):
        largest = tiles.amax(weight) if amax is None else amax.view(1, 1)
        scale = _RULES.get(recipe, float_scale)(largest)
        found.append((cast(weight, tiles.spread(scale)), scale.reciprocal()))
    return found if len(found) == 2 else found * 2


def values(recipe: str, form: Form) -> Tensor:
    """What products over columns compute with, float32 (rows, columns)."""
    data, scale_inv = form
    tiles = tiles_of(recipe, data.shape)[0]
    return data.view(torch.float8_e4m3fn).float() * tiles.spread(scale_inv)
