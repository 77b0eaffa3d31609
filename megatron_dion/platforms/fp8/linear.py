"""The three products of a linear layer with operands in FP8."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from megatron_dion.platforms.fp8.operands import CurrentScaling, DelayedScaling, Operand, Recipe
from megatron_dion.platforms.fp8.weights import fp8_of


class Fp8Linear:
    """What a linear layer does to its operands.

    Args:
        name: of the layer, for messages.
        recipe: how operands are scaled.
        history_length: with delayed scaling.
        algorithm: with delayed scaling.
        margin: with delayed scaling.

    Attributes:
        delayed: the operands' scalings that change between iterations: input, weight, gradient.
    """

    def __init__(
        self, name: str, recipe: Recipe, history_length: int, algorithm: str, margin: int
    ) -> None:
        self._name = name
        self._recipe = recipe
        self.delayed: tuple[DelayedScaling, ...] = ()
        dtypes = (recipe.forward, recipe.forward, recipe.backward)
        if recipe.name == "delayed":
            scalings = [
                DelayedScaling(dtype, history_length, algorithm, margin) for dtype in dtypes
            ]
            self.delayed = tuple(scalings)
            self._operands: list[Operand] = [*scalings]
        else:
            tiles = (recipe.tile, recipe.weight_tile, recipe.tile)
            self._operands = [
                CurrentScaling(tile, recipe.rule, dtype)
                for tile, dtype in zip(tiles, dtypes, strict=True)
            ]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """X W^T; its gradients are products of FP8 operands too.

        With delayed scaling, magnitudes count only where gradients follow, not in evaluations.

        Args:
            x: (..., columns).
            weight: (rows, columns).

        Returns:
            (..., rows), in the type of `x`.

        Raises:
            ValueError: CUDA would refuse the sizes.
        """
        if not x.numel():
            return linear(x, weight)  # an expert without tokens
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        sizes = {"tokens": rows, "outputs": weight.shape[0], "inputs": columns}
        check_sizes(self._name, self._recipe, sizes)
        for scaling in self.delayed:
            scaling.counts = torch.is_grad_enabled()
        y: Tensor = _Product.apply(x.reshape(rows, -1), weight, self)
        return y.view(*x.shape[:-1], -1)

    def of_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._operands[0](x)

    def of_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of a weight that is kept in FP8, what is kept."""
        kept = fp8_of(weight)
        return self._operands[1](weight) if kept is None else kept.values()

    def of_gradient(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return self._operands[2](gradient)


def check_sizes(name: str, recipe: Recipe, sizes: dict[str, int]) -> None:
    """Raises ValueError for sizes of a product that CUDA's FP8 products refuse."""
    for what, size in sizes.items():
        if size % recipe.multiple:
            raise ValueError(
                f"{name}: {size} {what} are not a multiple of {recipe.multiple}, which FP8 products"
                f" with --fp8-recipe {recipe.name} need"
            )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Fp8Linear) -> Tensor:
        x_over_columns, x_over_rows = layer.of_input(x)
        weight_over_columns, weight_over_rows = layer.of_weight(weight)
        ctx.save_for_backward(x_over_rows, weight_over_rows)
        ctx.layer, ctx.types = layer, (x.dtype, weight.dtype)
        return (x_over_columns @ weight_over_columns.T).to(x.dtype)  # (tokens, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        over_columns, over_rows = ctx.layer.of_gradient(gradients[0])
        x_type, weight_type = ctx.types
        x_gradient = (over_columns @ weight).to(x_type)  # (tokens, columns)
        weight_gradient = (over_rows.T @ x).to(weight_type)  # (rows, columns)
        return x_gradient, weight_gradient, None
