import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dion.algorithm.right_factor import (
    DAMPING,
    inner_products,
    squared_norms,
    to_orthonormal_columns,
    to_unit_columns,
)

EPS = 1e-8
ROUNDING = 2.0**-24
every_shape = pytest.mark.parametrize(
    ("m", "r"), [(1, 1), (9, 1), (2, 2), (8, 8), (40, 5), (64, 32)]
)


def gaussian(m: int, r: int, seed: int = 0) -> Tensor:
    return torch.randn(m, r, generator=torch.Generator().manual_seed(seed))


def conditioned(m: int, r: int, condition: float) -> Tensor:
    """Singular values in geometric progression, in no relation to the columns."""
    left = torch.linalg.qr(gaussian(m, r, 1).double()).Q
    right = torch.linalg.qr(gaussian(r, r, 2).double()).Q
    values = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)
    return (left * values @ right.mT).float()


def positive_qr(matrix: Tensor) -> Tensor:
    """The Q of R = Q U with a positive diagonal of U, in float64."""
    q, u = torch.linalg.qr(matrix.double())
    return q * torch.where(u.diagonal() < 0, -1.0, 1.0)


def damped_qr(matrix: Tensor, eps: float) -> Tensor:
    """What `to_orthonormal_columns` promises, in float64."""
    r = matrix.shape[1]
    unit = matrix.double() / (matrix.double().norm(dim=0).max() + eps)
    return positive_qr(torch.cat([unit, DAMPING * torch.eye(r, dtype=torch.float64)]))[:-r]


def orthonormal(matrix: Tensor, eps: float = EPS) -> Tensor:
    """R C in float64, so that only the rounding of C is in it."""
    [factor] = to_orthonormal_columns([inner_products(matrix)], eps)
    assert factor.shape == (matrix.shape[1],) * 2
    assert factor.dtype == torch.float32
    assert factor.isfinite().all()
    return matrix.double() @ factor.double()


def largest_singular_value(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, ord=2).item()


@every_shape
@pytest.mark.parametrize("factor", [1.0, 1e30, 1e-30])
def test_unit_columns_have_norm_one(m: int, r: int, factor: float) -> None:
    rows = gaussian(m, r) * factor
    norms = squared_norms(rows).sqrt()
    torch.testing.assert_close(norms, rows.double().norm(dim=0))
    to_unit = to_unit_columns(norms, 1e-38)
    assert to_unit.dtype == torch.float32
    torch.testing.assert_close(rows.double() * to_unit.double(), rows.double() / norms)


def test_eps_is_added_to_the_norm() -> None:
    norms = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    assert to_unit_columns(norms, 1.0).tolist() == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_squares_and_products_add_up_over_rows(cut: int) -> None:
    rows = gaussian(40, 5)
    for function in (squared_norms, inner_products):
        assert function(rows).dtype == torch.float64
        torch.testing.assert_close(function(rows[:cut]) + function(rows[cut:]), function(rows))
        assert not function(rows[:0]).any()
    torch.testing.assert_close(inner_products(rows), rows.double().T @ rows.double())
    torch.testing.assert_close(squared_norms(rows), inner_products(rows).diagonal())


def tolerance(matrix: Tensor) -> float:
    """C is as large as R's condition k, its rounding costs u k; that of the Gram matrix k^2 / 2^53.

    The damping limits k.
    """
    values = torch.linalg.svdvals(matrix.double())
    r = matrix.shape[1]
    k = values[0].item() / max(values[-1].item(), values[0].item() * DAMPING)
    return r * (ROUNDING * k + 2.0**-53 * k**2)


@every_shape
@pytest.mark.parametrize("condition", [1.0, 1e1, 1e3, 1e5])
def test_orthonormal_columns_are_those_of_the_damped_qr(m: int, r: int, condition: float) -> None:
    matrix = conditioned(m, r, condition)
    q = orthonormal(matrix)
    assert (q - damped_qr(matrix, EPS)).norm().item() < tolerance(matrix)
    if condition <= 1e3:  # the damping is nothing
        assert (q - positive_qr(matrix)).norm().item() < 2 * math.sqrt(r) * 1e-4
    if condition <= 1e1:
        assert (q - positive_qr(matrix)).norm().item() < 1e-5
        assert largest_singular_value(q) <= 1 + 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_columns_of_different_sizes(seed: int) -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    matrix = gaussian(40, 7, seed) * torch.logspace(-5, 0, 7)[order]
    assert (orthonormal(matrix) - damped_qr(matrix, EPS)).norm().item() < tolerance(matrix)


def test_columns_far_below_the_largest_tend_to_zero() -> None:
    matrix = gaussian(40, 3)
    matrix[:, 1] *= 1e-20
    q = orthonormal(matrix)
    assert q[:, 1].norm() < 1e-8
    assert (q[:, [0, 2]] - positive_qr(matrix[:, [0, 2]])).abs().max().item() < 1e-5


@every_shape
@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_size_does_not_matter(m: int, r: int, factor: float) -> None:
    """Entries of about 1e30 and 1e-30, to which eps must be small."""
    matrix = gaussian(m, r)
    torch.testing.assert_close(
        orthonormal(matrix * factor, 1e-38), orthonormal(matrix, 1e-38), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("factor", [1e30, 1.0, 1e-12, 1e-30])
def test_what_is_smaller_than_eps_tends_to_zero(factor: float) -> None:
    q = orthonormal(gaussian(20, 4) * factor)
    size = largest_singular_value(q)
    assert size <= 1 + 1e-5
    if factor >= 1:
        assert size > 0.9
    if factor == 1e-30:
        assert size < 1e-8


@pytest.mark.parametrize("zeros", [[0], [2], [4], [1, 3], [0, 1, 2, 3, 4]])
def test_zero_columns_stay_zero_and_leave_the_others_alone(zeros: list[int]) -> None:
    matrix = gaussian(20, 5)
    matrix[:, zeros] = 0
    others = [i for i in range(5) if i not in zeros]
    q = orthonormal(matrix)
    assert not q[:, zeros].any()
    if others:
        assert (q[:, others] - positive_qr(matrix[:, others])).abs().max().item() < 1e-5


DEFICIENT = {
    "rank one": lambda m, r: gaussian(m, 1) @ gaussian(1, r, 1),
    "rank two": lambda m, r: gaussian(m, 2) @ gaussian(2, r, 1),
    "equal columns": lambda m, r: gaussian(m, 1).expand(m, r),
    "wide": lambda m, r: gaussian(r // 2, r),
    "zero": lambda m, r: torch.zeros(m, r),
}
every_deficiency = pytest.mark.parametrize("deficient", DEFICIENT.values(), ids=DEFICIENT)


@every_deficiency
@pytest.mark.parametrize(("m", "r"), [(12, 4), (64, 64), (300, 100)])
@pytest.mark.parametrize("factor", [1.0, 1e30, 1e-30])
def test_rank_deficiency_is_finite_and_bounded(
    deficient: Callable[[int, int], Tensor], m: int, r: int, factor: float
) -> None:
    """Where the damping alone makes C, it is as large as 1 / DAMPING, and its rounding shows."""
    q = orthonormal(deficient(m, r) * factor)
    assert q.isfinite().all()
    assert largest_singular_value(q) <= 1 + math.sqrt(r) * ROUNDING / DAMPING


def test_batches_of_several_shapes() -> None:
    shapes = [(9, 2), (30, 2), (12, 5), (5, 5), (7, 1), (8, 2)]
    rows = [gaussian(m, r, seed) for seed, (m, r) in enumerate(shapes)]
    factors = to_orthonormal_columns([inner_products(matrix) for matrix in rows], EPS)
    assert len(factors) == len(rows)
    for matrix, factor in zip(rows, factors, strict=True):
        torch.testing.assert_close(matrix.double() @ factor.double(), orthonormal(matrix))


def test_nothing_gives_nothing() -> None:
    assert to_orthonormal_columns([], EPS) == []
