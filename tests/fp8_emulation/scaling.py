"""FP8 numbers and their scales, computed as Transformer Engine computes them. Torch only.

A value is multiplied by a scale and cast to eight bits; `scale_inv` is what leads back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

LARGEST = {E4M3: 448.0, E5M2: 57344.0}

ScaleRule = Callable[[Tensor, torch.dtype], Tensor]


def float_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that makes the largest value the largest FP8 number.

    Args:
        amax: largest magnitudes, float32, any shape.
        dtype: `E4M3` or `E5M2`.

    Returns:
        Scales, float32, of the same shape; 1 where there is nothing to scale, or nothing finite
        (compute_scale_from_amax in Transformer Engine's common/recipe/recipe_common.cuh).
    """
    largest = torch.full_like(amax, LARGEST[dtype])
    scale = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def power_of_two_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two that is not above `float_scale`: its bits without the mantissa."""
    bits = float_scale(amax, dtype).view(torch.int32) & -0x0080_0000
    return bits.view(torch.float32)


def e8m0_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale whose inverse is an E8M0 number: amax / largest, rounded up to a power of two.

    OCP Microscaling Formats 1.0, section 5.4 and 6.3, with Transformer Engine's rounding up
    (float_to_e8m0 in its common/util/ptx.cuh).
    """
    bits = (amax * (1.0 / LARGEST[dtype])).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x007F_FFFF
    exponent = exponent + (mantissa > 0).int()
    exponent = torch.where(amax.isfinite(), exponent.clamp(max=0xFE), 0xFE)
    return torch.ldexp(torch.ones_like(amax), 127 - exponent)


def cast(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values times scale in FP8; what is too large becomes the largest, NaN stays NaN."""
    largest = LARGEST[dtype]
    return (values.float() * scale).clamp(-largest, largest).to(dtype)


@dataclass(frozen=True)
class Tiles:
    """How a matrix is divided into tiles that have one scale each.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        height: of a tile; the last ones may be smaller.
        width: of a tile.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def counts(self) -> tuple[int, int]:
        """Number of tiles below one another and side by side."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    def amax(self, matrix: Tensor) -> Tensor:
        """The largest magnitude in each tile.

        Args:
            matrix: (rows, columns).
        """
        down, across = self.counts
        missing = (0, across * self.width - self.columns, 0, down * self.height - self.rows)
        whole = pad(matrix.float().abs(), missing)
        return whole.view(down, self.height, across, self.width).amax(dim=(1, 3))  # counts

    def spread(self, scales: Tensor) -> Tensor:
        """The scale of each element, broadcast where all of a row or column are the same.

        Args:
            scales: of the tiles, of shape `counts`.
        """
        if scales.shape[0] > 1 and self.height > 1:
            scales = scales.repeat_interleave(self.height, dim=0)[: self.rows]
        if scales.shape[1] > 1 and self.width > 1:
            scales = scales.repeat_interleave(self.width, dim=1)[:, : self.columns]
        return scales  # (rows or 1, columns or 1)

    def of_elements(self, start: int, stop: int) -> Tensor:
        """The tile, of all in one row, of each of some elements of the flattened matrix."""
        element = torch.arange(start, stop)
        row, column = element // self.columns, element % self.columns
        return row // self.height * self.counts[1] + column // self.width  # (stop - start,)

    def amax_of_piece(self, piece: Tensor, start: int) -> Tensor:
        """The largest magnitudes in each tile of a piece of the flattened matrix; 0 elsewhere.

        Args:
            piece: 1-D.
            start: its first element's place.
        """
        down, across = self.counts
        found = torch.zeros(down * across)
        tiles = self.of_elements(start, start + piece.numel())
        return found.scatter_reduce_(0, tiles, piece.float().abs(), "amax").view(down, across)
