import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dion.algorithm import ORTHONORMALIZERS, orthonormalize
from megatron_dion.algorithm.counter_random import signs
from megatron_dion.algorithm.orthonormalize import Sketch

OVERSAMPLE = 1.25
ROUNDING = 2.0**-24
every_method = pytest.mark.parametrize("method", ORTHONORMALIZERS)
every_shape = pytest.mark.parametrize(
    ("batch", "n", "r"),
    [
        (1, 1, 1),
        (1, 9, 1),
        (3, 30, 1),
        (1, 2, 2),
        (3, 4, 4),
        (1, 16, 16),
        (1, 11, 8),  # one row more than the sketch has
        (3, 6, 4),
        (3, 80, 12),
    ],
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sign_sketch(batch: int, n: int) -> Sketch:
    def sketch(rows: int) -> Tensor:
        drawn = [signs(0, f"matrix {i}", torch.arange(n), rows).T for i in range(batch)]
        return torch.stack(drawn)

    return sketch


def orthonormal(p: Tensor, method: str, sketch: Sketch | None = None) -> Tensor:
    batch, n, _ = p.shape
    return orthonormalize(p, method, sketch or sign_sketch(batch, n), OVERSAMPLE)


def positive_qr(p: Tensor) -> Tensor:
    """The Q of P = Q U with a positive diagonal of U, in float64."""
    q, u = torch.linalg.qr(p.double())
    return q * torch.where(u.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


def gaussian(batch: int, n: int, r: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, n, r, generator=generator(seed))


def well_conditioned(batch: int, n: int, r: int) -> Tensor:
    """Condition number 3 (condition 1 where r = 1)."""
    return conditioned(batch, n, r, 3.0)


def conditioned(batch: int, n: int, r: int, condition: float) -> Tensor:
    """Singular values in geometric progression, in no relation to the columns."""
    left = torch.linalg.qr(gaussian(batch, n, r, 1).double()).Q
    right = torch.linalg.qr(gaussian(batch, r, r, 2).double()).Q
    values = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)
    return (left * values @ right.mT).float()


def assert_orthonormal(q: Tensor, tolerance: float = 1e-5) -> None:
    assert q.dtype == torch.float32
    assert q.isfinite().all()
    exact = q.double()
    identity = torch.eye(q.shape[-1], dtype=torch.float64)
    assert (exact.mT @ exact - identity).abs().max().item() < tolerance


def assert_spans(q: Tensor, p: Tensor) -> None:
    """Every column of P, scaled to unit norm, lies in the span of Q's orthonormal columns."""
    unit = p.double() / p.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
    exact = q.double()
    assert (unit - exact @ (exact.mT @ unit)).norm(dim=1).max().item() < 1e-5


def column_tolerances(p: Tensor) -> Tensor:
    """How far rounding may turn each column of Q, (batch, r).

    Column j of Q depends on the first j columns of P only. If these, scaled to unit norm, have
    condition number k, a relative change u of P turns it by about k u (Higham 2002, section
    19.9), and the methods are backward stable to about u sqrt(n r).
    """
    unit = p.double() / p.double().norm(dim=1, keepdim=True)
    _, n, r = p.shape
    conditions = [torch.linalg.cond(unit[:, :, : j + 1]) for j in range(r)]
    return ROUNDING * math.sqrt(n * r) * torch.stack(conditions, dim=1)


@every_method
@every_shape
def test_well_conditioned_gives_the_positive_qr(batch: int, n: int, r: int, method: str) -> None:
    p = well_conditioned(batch, n, r)
    q = orthonormal(p, method)
    assert q.shape == p.shape
    assert_orthonormal(q)
    assert_spans(q, p)
    assert (q - positive_qr(p)).abs().max().item() < 1e-5


@every_method
@pytest.mark.parametrize(("batch", "n", "r"), [(3, 40, 4), (1, 100, 12), (3, 24, 16)])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned_gives_the_positive_qr(
    batch: int, n: int, r: int, condition: float, method: str
) -> None:
    p = conditioned(batch, n, r, condition)
    q = orthonormal(p, method)
    assert_orthonormal(q)
    assert_spans(q, p)
    distances = (q.double() - positive_qr(p)).norm(dim=1)  # (batch, r)
    assert (distances / column_tolerances(p)).max().item() < 1


# Here a square sketch of signs would be nearly singular, and make P worse instead of better.
@every_method
@pytest.mark.parametrize(("n", "r"), [(5, 5), (11, 10), (12, 10), (7, 5)])
@pytest.mark.parametrize("condition", [3.0, 1e3, 1e6])
def test_many_matrices_with_few_more_rows_than_columns(
    n: int, r: int, condition: float, method: str
) -> None:
    assert_orthonormal(orthonormal(conditioned(40, n, r, condition), method))


def duplicate_columns(p: Tensor) -> Tensor:
    p[:, :, -1] = p[:, :, 0]
    return p


def low_rank(p: Tensor) -> Tensor:
    p[:, :, 2:] = p[:, :, :2] @ gaussian(p.shape[0], 2, p.shape[2] - 2, 3)
    return p


def nearly_dependent(p: Tensor) -> Tensor:
    p[:, :, -1] = p[:, :, 0] + 1e-7 * p[:, :, -1]
    return p


# A nearly singular Gram matrix may have a Cholesky factor: nothing but the result tells.
@every_method
@pytest.mark.parametrize(("n", "r"), [(5, 5), (12, 10), (40, 8), (64, 32)])
@pytest.mark.parametrize("degenerate", [duplicate_columns, low_rank, nearly_dependent])
def test_dependent_columns_are_completed(
    degenerate: Callable[[Tensor], Tensor], n: int, r: int, method: str
) -> None:
    p = degenerate(gaussian(40, n, r))
    q = orthonormal(p, method)
    assert_orthonormal(q, tolerance=2e-5)  # what the probes of the result let pass
    assert_spans(q, p)


@every_method
@every_shape
def test_zeros_are_completed(batch: int, n: int, r: int, method: str) -> None:
    assert_orthonormal(orthonormal(torch.zeros(batch, n, r), method))


@every_method
@pytest.mark.parametrize("column", [0, 2, 4])
def test_zero_column_is_completed(column: int, method: str) -> None:
    p = gaussian(3, 20, 5)
    p[:, :, column] = 0
    q = orthonormal(p, method)
    assert_orthonormal(q)
    assert_spans(q, p)


@every_method
@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_size_does_not_matter(factor: float, method: str) -> None:
    """Entries of about 1e30 and 1e-30."""
    p = well_conditioned(3, 20, 5)
    assert torch.equal(orthonormal(p * factor, method), orthonormal(p, method))


@every_method
@pytest.mark.parametrize("seed", range(3))
def test_sizes_of_columns_do_not_matter(seed: int, method: str) -> None:
    order = torch.randperm(9, generator=generator(seed))
    scales = torch.logspace(-20, 20, 9, dtype=torch.float64)[order].float()
    p = well_conditioned(2, 40, 9)
    q = orthonormal(p * scales, method)
    assert_orthonormal(q)
    assert (q - positive_qr(p)).abs().max().item() < 1e-5


@every_method
def test_a_broken_matrix_leaves_the_others_alone(method: str) -> None:
    healthy = well_conditioned(3, 20, 5)
    p = healthy.clone()
    p[1] = 0
    q = orthonormal(p, method)
    alone = orthonormal(healthy, method)
    assert torch.equal(q[[0, 2]], alone[[0, 2]])
    assert_orthonormal(q)


@every_method
def test_argument_keeps_its_values(method: str) -> None:
    p = gaussian(2, 12, 4)
    before = p.clone()
    orthonormal(p, method)
    assert torch.equal(p, before)


@pytest.mark.parametrize("method", ["rcqr", "cqr"])
@pytest.mark.parametrize("failed", [[0], [1, 2], [0, 1, 2]])
def test_reported_cholesky_failure_falls_back_to_householder(
    monkeypatch: pytest.MonkeyPatch, method: str, failed: list[int]
) -> None:
    truthful = torch.linalg.cholesky_ex

    def failing(gram: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
        factor, info = truthful(gram, upper=upper)
        info[failed] = 1
        return factor, info

    p = well_conditioned(3, 20, 5)
    others = [i for i in range(3) if i not in failed]
    unbroken = orthonormal(p, method)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    q = orthonormal(p, method)
    assert torch.equal(q[failed], orthonormal(p, "qr")[failed])
    assert torch.equal(q[others], unbroken[others])


@pytest.mark.parametrize("columns", [5, 12])
def test_sketch_of_zeros_falls_back_to_householder(columns: int) -> None:
    p = well_conditioned(2, 12, columns)
    q = orthonormal(p, "rcqr", lambda rows: torch.zeros(2, rows, 12))
    assert torch.equal(q, orthonormal(p, "qr"))


@pytest.mark.parametrize(("n", "r", "rows"), [(40, 8, 16), (99, 40, 50), (9, 8, 16), (1, 1, 9)])
def test_sketch_has_the_oversampled_rows_and_some_more_for_few_columns(
    n: int, r: int, rows: int
) -> None:
    asked = []

    def sketch(count: int) -> Tensor:
        asked.append(count)
        return sign_sketch(1, n)(count)

    orthonormal(well_conditioned(1, n, r), "rcqr", sketch)
    assert asked == [rows]


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown orthonormalizer 'svd'"):
        orthonormal(gaussian(1, 4, 2), "svd")
