"""The products of an emulated linear layer, against operands rounded number by number."""

import pytest
import torch
from torch import Tensor

from megatron_dion.platforms.fp8.linear import Fp8Linear
from megatron_dion.platforms.fp8.operands import RECIPES, Recipe
from megatron_dion.platforms.fp8.scaling import E4M3, E5M2, LARGEST

TOKENS, OUTPUTS, INPUTS = 160, 192, 288
TILES = {"tensorwise": None, "blockwise": 128, "mxfp8": 32}


def layer_of(name: str, fp8_format: str = "hybrid") -> Fp8Linear:
    return Fp8Linear("layer", Recipe.of(name, fp8_format), 1, "most_recent", 0)


def rounded(name: str, matrix: Tensor, dim: int, dtype: torch.dtype, is_weight: bool) -> Tensor:
    """A matrix in FP8 and back, tile by tile; a product sums over `dim`."""
    length = TILES[name]
    if length is None:
        return in_fp8(name, matrix, dtype)
    across = length if is_weight and name == "blockwise" else 1
    tall, wide = (across, length) if dim == 1 else (length, across)
    found = torch.empty_like(matrix)
    for i in range(0, matrix.shape[0], tall):
        for j in range(0, matrix.shape[1], wide):
            tile = (slice(i, i + tall), slice(j, j + wide))
            found[tile] = in_fp8(name, matrix[tile], dtype)
    return found


def in_fp8(name: str, tile: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.tensor(LARGEST[dtype]) / tile.abs().max()
    if name != "tensorwise":
        scale = 2.0 ** scale.log2().floor()
    return (tile * scale).to(dtype).float() / scale


@pytest.mark.parametrize("name", TILES)
def test_products_are_of_rounded_operands(name: str) -> None:
    x = torch.randn(4, TOKENS // 4, INPUTS, requires_grad=True)
    weight = torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    gradient = torch.randn(4, TOKENS // 4, OUTPUTS)
    y = layer_of(name).product(x, weight)
    y.backward(gradient)
    flat, up = x.detach().view(TOKENS, INPUTS), gradient.view(TOKENS, OUTPUTS)
    w = weight.detach()
    expected = rounded(name, flat, 1, E4M3, False) @ rounded(name, w, 1, E4M3, True).T
    torch.testing.assert_close(y.view(TOKENS, OUTPUTS), expected, rtol=1e-5, atol=1e-4)
    expected = rounded(name, up, 1, E5M2, False) @ rounded(name, w, 0, E4M3, True)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.view(TOKENS, INPUTS), expected, rtol=1e-5, atol=1e-4)
    expected = rounded(name, up, 0, E5M2, False).T @ rounded(name, flat, 0, E4M3, False)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-4)
    assert not torch.equal(y.view(TOKENS, OUTPUTS), flat @ w.T)


def test_delayed_scaling_uses_earlier_iterations() -> None:
    layer = layer_of("delayed", "e4m3")
    x, weight = 1000 * torch.ones(16, 16), torch.ones(16, 16, requires_grad=True)
    assert layer.product(x, weight).max() == 16 * 448  # scales begin at one
    for scaling in layer.delayed:
        scaling.update(scaling.amax.clone())
    with torch.no_grad():
        assert layer.product(x, weight).max() == pytest.approx(16 * 1000)
        layer.product(2 * x, weight)
    assert layer.delayed[0].amax == 0  # evaluations do not count


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("sizes", "named"),
    [((24, 32, 32), "24 tokens"), ((32, 24, 32), "24 outputs"), ((32, 32, 24), "24 inputs")],
)
def test_sizes_that_cuda_refuses_are_refused(
    name: str, sizes: tuple[int, int, int], named: str
) -> None:
    tokens, outputs, inputs = sizes
    with pytest.raises(ValueError, match=f"{named} are not a multiple of"):
        layer_of(name).product(torch.ones(tokens, inputs), torch.ones(outputs, inputs))


def test_mxfp8_needs_larger_multiples() -> None:
    layer_of("blockwise").product(torch.ones(48, 48), torch.ones(48, 48))
    with pytest.raises(ValueError, match="48 tokens are not a multiple of 32"):
        layer_of("mxfp8").product(torch.ones(48, 48), torch.ones(48, 48))


@pytest.mark.parametrize("name", RECIPES)
def test_experts_without_tokens(name: str) -> None:
    weight = torch.ones(32, 32, requires_grad=True)
    layer_of(name).product(torch.ones(0, 32), weight).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
