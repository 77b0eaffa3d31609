"""The products of the blocks of a matrix with factors, in the precision that was asked for.

The names of precisions are torch's and those of Megatron's `--muon-fp32-matmul-prec`, with the same
meaning. A block of B or W is (k, rows, columns), one of Q or R (k, rows, r), of P (columns, r); all
are float32. Batches over k need no copy where rectangles lie at equal distances.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

PRECISIONS = ("highest", "high", "medium")


class Products(Protocol):
    """Products in one precision, in place."""

    def add_left(self, left: Tensor, total: Tensor, right: Tensor) -> None:
        """P = P + B^T Q, with the sum over k in it."""

    def set_right(self, projection: Tensor, total: Tensor, left: Tensor) -> None:
        """R = B P."""

    def add_outer(
        self, target: Tensor, right: Tensor, left: Tensor, *, beta: float, alpha: float
    ) -> None:
        """Target = beta target + alpha R P^T."""


@contextmanager
def products_in(precision: str) -> Iterator[Products]:
    """What multiplies in one of `PRECISIONS`, within a with statement.

    `highest` is float32. `high` lets a device that can round operands to TF32 (10 bits); most CPUs
    cannot. `medium` rounds operands and each product to bf16 (7 bits).
    """
    if precision == "medium":
        yield _Bf16Products()
    else:
        with float32_products_in(precision):
            yield _Float32Products()


@contextmanager
def float32_products_in(precision: str) -> Iterator[None]:
    """Sets what torch itself multiplies in; restored at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Float32Products:
    def add_left(self, left: Tensor, total: Tensor, right: Tensor) -> None:
        left.addbmm_(total.mT, right)

    def set_right(self, projection: Tensor, total: Tensor, left: Tensor) -> None:
        torch.bmm(total, _repeated(left, total), out=projection)

    def add_outer(
        self, target: Tensor, right: Tensor, left: Tensor, *, beta: float, alpha: float
    ) -> None:
        target.baddbmm_(right, _repeated(left.T, right), beta=beta, alpha=alpha)


class _Bf16Products:
    """Rounding copies anyway, so here all k rectangles are one matrix."""

    def add_left(self, left: Tensor, total: Tensor, right: Tensor) -> None:
        left += _bf16_rows(total).T @ _bf16_rows(right)

    def set_right(self, projection: Tensor, total: Tensor, left: Tensor) -> None:
        projection.copy_((_bf16_rows(total) @ left.bfloat16()).view(projection.shape))

    def add_outer(
        self, target: Tensor, right: Tensor, left: Tensor, *, beta: float, alpha: float
    ) -> None:
        product = _bf16_rows(alpha * right) @ left.bfloat16().T  # (k rows, columns)
        torch.add(product.view(target.shape), target, alpha=beta, out=target)


def _repeated(left: Tensor, blocks: Tensor) -> Tensor:
    """A view (k, ...) of the same factor for each of k rectangles."""
    count = blocks.shape[0]
    return left.unsqueeze(0) if count == 1 else left.expand(count, -1, -1)  # half the time for one


def _bf16_rows(blocks: Tensor) -> Tensor:
    """(k, rows, columns) to (k rows, columns)."""
    rounded = blocks.to(torch.bfloat16, memory_format=torch.contiguous_format)
    return rounded.flatten(end_dim=1)
