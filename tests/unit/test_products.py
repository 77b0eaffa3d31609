"""Products of stacks of rectangles with factors, in each precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dion.algorithm import PRECISIONS
from megatron_dion.algorithm.products import Products, float32_products_in, products_in

STACKS = [(1, 5, 7), (3, 4, 6), (4, 1, 9), (2, 0, 3), (1, 6, 1)]
RANK = 3
# Of float32 sums, and of operands and results with 8 significant bits.
TOLERANCES = {"highest": 1e-6, "high": 1e-6, "medium": 2e-2}

every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_stack = pytest.mark.parametrize("stack", STACKS, ids=str)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def interleaved(k: int, rows: int, columns: int) -> Tensor:
    """As a fused weight has them: with the rows of two other matrices between."""
    return draw(k, 3, rows, columns)[:, 1]


def run(precision: str, multiply: Callable[[Products], None]) -> None:
    with products_in(precision) as products:
        multiply(products)


def assert_close(actual: Tensor, expected: Tensor, size: float, precision: str) -> None:
    error = (actual.double() - expected).abs()
    assert error.numel() == 0 or error.max() <= TOLERANCES[precision] * size


@every_precision
@every_stack
def test_left_factors_add_up_over_the_stack(stack: tuple[int, int, int], precision: str) -> None:
    total, right, left = interleaved(*stack), interleaved(*stack[:2], RANK), draw(stack[2], RANK)
    expected = left.double() + torch.einsum("kmn,kmr->nr", total.double(), right.double())
    run(precision, lambda products: products.add_left(left, total, right))
    assert_close(left, expected, 10, precision)


@every_precision
@every_stack
def test_right_products_overwrite_whatever_was_there(
    stack: tuple[int, int, int], precision: str
) -> None:
    total, left = interleaved(*stack), draw(stack[2], RANK)
    projection = torch.full((stack[0], 2, stack[1], RANK), torch.nan)[:, 0]
    run(precision, lambda products: products.set_right(projection, total, left))
    assert_close(projection, total.double() @ left.double(), 10, precision)


@every_precision
@every_stack
def test_outer_products_change_their_own_rows_only(
    stack: tuple[int, int, int], precision: str
) -> None:
    fused = draw(stack[0], 3, *stack[1:])
    before, target = fused.double(), fused[:, 1]
    right, left = interleaved(*stack[:2], RANK), draw(stack[2], RANK)
    expected = before.clone()
    expected[:, 1] = 0.9 * before[:, 1] - 0.25 * right.double() @ left.double().T
    run(precision, lambda p: p.add_outer(target, right, left, beta=0.9, alpha=-0.25))
    assert_close(fused, expected, 4, precision)
    assert torch.equal(fused[:, ::2].double(), before[:, ::2])


def test_medium_rounds_operands_and_highest_does_not() -> None:
    total, left = torch.full((1, 1, 1), 1 + 2.0**-10), torch.ones(1, 1)
    for precision, expected in (("highest", 1 + 2.0**-10), ("medium", 1.0)):
        projection = torch.empty(1, 1, 1)
        run(precision, lambda p, out=projection: p.set_right(out, total, left))
        assert projection.item() == expected


@every_precision
def test_torch_has_its_own_precision_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    with float32_products_in(precision):
        assert torch.get_float32_matmul_precision() == precision
    assert torch.get_float32_matmul_precision() == before
