"""Operations of products and factorizations, counted where torch dispatches them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def product(left: Tensor, right: Tensor) -> float:
    """(..., m, k) times (..., k, n)."""
    return 2.0 * left.numel() * right.shape[-1]


def qr(matrix: Tensor, with_q: bool) -> float:
    *batch, _, _ = matrix.shape
    columns, rows = sorted(matrix.shape[-2:])
    one = 2 * rows * columns**2 - 2 / 3 * columns**3
    return torch.Size(batch).numel() * one * (2 if with_q else 1)


def solve(triangle: Tensor, right: Tensor) -> float:
    """For each vector of the right-hand sides, which a batch of triangles may share."""
    shared = triangle[..., 0, 0].numel() if right.dim() < triangle.dim() else 1
    return float(shared * right.numel() * triangle.shape[-1])


COUNTS: dict[str, tuple[str, Callable[..., float]]] = {
    "mm": ("products", product),
    "bmm": ("products", product),
    "addmm": ("products", lambda _, left, right: product(left, right)),
    "baddbmm": ("products", lambda _, left, right: product(left, right)),
    "addbmm": ("products", lambda _, left, right: product(left, right)),
    "linalg_qr": ("factorizations", lambda a, mode="reduced": qr(a, mode != "r")),
    "geqrf": ("factorizations", lambda a: qr(a, False)),
    "linalg_householder_product": ("factorizations", lambda a, tau: qr(a, False)),
    "linalg_cholesky_ex": ("factorizations", lambda a: a.numel() * a.shape[-1] / 3),
    "linalg_solve_triangular": ("factorizations", lambda a, b, left=True: solve(a, b)),
}


class CountedOperations(TorchDispatchMode):
    """Counts operations of products, and of factorizations by their formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.split(".")[0].rstrip("_")
        known = {"mode", "left"}
        if name in COUNTS:
            kind, count = COUNTS[name]
            named = {k: v for k, v in (kwargs or {}).items() if k in known}
            self.found[kind] += count(*args, **named)  # type: ignore[assignment]
        return func(*args, **(kwargs or {}))
