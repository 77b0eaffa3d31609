import math
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_dion.algorithm import ORTHONORMALIZERS, orthonormalize
from megatron_dion.algorithm.counter_random import signs
from megatron_dion.algorithm.orthonormalize import (
    ONCE,
    Sketch,
    factor,
    orthonormalize_part,
    pack,
    packed_rows,
    summed_rows,
    unpack,
)

OVERSAMPLE = 1.25
ROUNDING = 2.0**-24
CHOLESKY = ["rcqr", "cqr"]
every_method = pytest.mark.parametrize("method", ORTHONORMALIZERS)
every_cholesky = pytest.mark.parametrize("method", CHOLESKY)
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


def orthonormal(
    p: Tensor, method: str, sketch: Sketch | None = None, fallbacks: int | None = None
) -> Tensor:
    """The result alone; `fallbacks` is the number expected of the Cholesky methods, if known."""
    batch, n, _ = p.shape
    q, found = orthonormalize(p, method, sketch or sign_sketch(batch, n), OVERSAMPLE)
    if method in ("auto", "qr"):
        assert found == 0
    elif fallbacks is not None:
        assert found == fallbacks
    return q


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
    return with_values(batch, n, torch.logspace(0, -math.log10(condition), r, dtype=torch.float64))


def with_values(batch: int, n: int, values: Tensor) -> Tensor:
    """(batch, n, r) with the given singular values (r,)."""
    r = len(values)
    left = torch.linalg.qr(gaussian(batch, n, r, 1).double()).Q
    right = torch.linalg.qr(gaussian(batch, r, r, 2).double()).Q
    return (left * values @ right.mT).float()


def assert_orthonormal(q: Tensor, tolerance: float = 1e-5) -> None:
    assert q.dtype == torch.float32
    assert q.isfinite().all()
    exact = q.double()
    identity = torch.eye(q.shape[-1], dtype=torch.float64)
    assert (exact.mT @ exact - identity).abs().max().item() < tolerance


def let_pass(r: int) -> float:
    """The error that the probes of the result let pass; processors come more or less near."""
    return 5e-6 * r**0.5


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
    q = orthonormal(p, method, fallbacks=0)
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
    # Squared, 1e6 is more than float32 resolves: only the sketch prepares for it.
    known = 0 if condition <= 1e2 or method == "rcqr" else None
    q = orthonormal(p, method, fallbacks=known)
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
    q = orthonormal(conditioned(40, n, r, condition), method)
    assert_orthonormal(q, tolerance=max(1e-5, let_pass(r)))


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
    assert_orthonormal(q, tolerance=max(2e-5, let_pass(r)))
    assert_spans(q, p)


@every_method
@every_shape
def test_zeros_are_completed(batch: int, n: int, r: int, method: str) -> None:
    assert_orthonormal(orthonormal(torch.zeros(batch, n, r), method, fallbacks=batch))


@every_method
@pytest.mark.parametrize("column", [0, 2, 4])
def test_zero_column_is_completed(column: int, method: str) -> None:
    p = gaussian(3, 20, 5)
    p[:, :, column] = 0
    q = orthonormal(p, method, fallbacks=3)
    assert_orthonormal(q)
    assert_spans(q, p)


@every_method
@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_size_does_not_matter(factor: float, method: str) -> None:
    """Entries of about 1e30 and 1e-30, whose squares float32 does not hold."""
    p = well_conditioned(3, 20, 5)
    q = orthonormal(p * factor, method, fallbacks=0)
    assert torch.equal(q, orthonormal(p, "qr" if method == "auto" else method))


@every_method
@pytest.mark.parametrize("seed", range(3))
def test_sizes_of_columns_do_not_matter(seed: int, method: str) -> None:
    order = torch.randperm(9, generator=generator(seed))
    scales = torch.logspace(-20, 20, 9, dtype=torch.float64)[order].float()
    p = well_conditioned(2, 40, 9)
    q = orthonormal(p * scales, method, fallbacks=0)
    assert_orthonormal(q)
    assert (q - positive_qr(p)).abs().max().item() < 1e-5


@every_method
def test_a_broken_matrix_leaves_the_others_alone(method: str) -> None:
    healthy = well_conditioned(3, 20, 5)
    p = healthy.clone()
    p[1] = 0
    q = orthonormal(p, method, fallbacks=1)
    alone = orthonormal(healthy, method, fallbacks=0)
    assert torch.equal(q[[0, 2]], alone[[0, 2]])
    assert_orthonormal(q)


@every_method
def test_argument_keeps_its_values(method: str) -> None:
    p = gaussian(2, 12, 4)
    before = p.clone()
    orthonormal(p, method)
    assert torch.equal(p, before)


@every_cholesky
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
    q = orthonormal(p, method, fallbacks=len(failed))
    assert torch.equal(q[failed], orthonormal(p, "qr")[failed])
    assert torch.equal(q[others], unbroken[others])


@pytest.mark.parametrize("columns", [5, 12])
def test_sketch_of_zeros_falls_back_to_householder(columns: int) -> None:
    p = well_conditioned(2, 12, columns)
    q = orthonormal(p, "rcqr", lambda rows: torch.zeros(2, rows, 12), fallbacks=2)
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


def test_auto_is_one_cholesky_qr_where_columns_are_nearly_orthogonal() -> None:
    p = torch.cat([well_conditioned(1, 40, 8), conditioned(1, 40, 8, 1e3), gaussian(1, 40, 8)])
    q, householder = orthonormal(p, "auto"), orthonormal(p, "qr")
    whole, [failed], _ = in_parts(p, ONCE, [0, 40])
    assert failed.tolist() == [False, True, False]
    assert torch.equal(q[~failed], whole[~failed])
    assert not torch.equal(q[~failed], householder[~failed])
    assert torch.equal(q[failed], householder[failed])
    square = well_conditioned(2, 15, 8)
    assert torch.equal(orthonormal(square, "auto"), orthonormal(square, "qr"))


def test_elsewhere_auto_is_surely_rcqr_with_the_sketch_of_each_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[factor.__module__], "sure_method", lambda *_: "rcqr")
    p = conditioned(3, 40, 8, 1e3)
    p[1] = well_conditioned(1, 40, 8)
    broken = [0, 2]
    sketches = sign_sketch(3, 40)
    q, _ = orthonormalize(p, "auto", sketches, OVERSAMPLE)
    ours = orthonormalize(p[broken], "rcqr", lambda k: sketches(k)[broken], OVERSAMPLE)
    assert torch.equal(q[broken], ours[0])
    shared, _ = orthonormalize(p, "auto", lambda k: sketches(k)[:1], OVERSAMPLE)
    theirs = orthonormalize(p[broken], "rcqr", lambda k: sketches(k)[:1], OVERSAMPLE)
    assert torch.equal(shared[broken], theirs[0])


every_spectrum = pytest.mark.parametrize("spectrum", ["even", "one small", "half small"])


@every_spectrum
@pytest.mark.parametrize(("n", "r"), [(40, 8), (256, 64), (1024, 64), (600, 300)])
def test_one_cholesky_qr_is_exact_or_reported(n: int, r: int, spectrum: str) -> None:
    conditions = [1, 3, 10, 15, 20, 30, 50, 100, 1e3, 1e5, 1e8]
    p = torch.cat([with_spectrum(n, r, condition, spectrum) for condition in conditions])
    q, [failed], asked = in_parts(p, ONCE, [0, n])
    assert tuple(asked) == summed_rows(ONCE, r, OVERSAMPLE)
    assert not failed[:2].any()
    assert failed[-3:].all()
    fine = q[~failed].double()
    assert_orthonormal(q[~failed], tolerance=2e-5)
    assert (fine - positive_qr(p[~failed])).norm(dim=1).max().item() < 2e-5


def with_spectrum(n: int, r: int, condition: float, spectrum: str) -> Tensor:
    """(1, n, r): singular values from one to 1 / condition."""
    values = torch.ones(r, dtype=torch.float64)
    if spectrum == "even":
        return conditioned(1, n, r, condition)
    values[-1 if spectrum == "one small" else r // 2 :] = 1 / condition
    return with_values(1, n, values)


@pytest.mark.parametrize("size", [1e-38, 1e-22, 1e-18, 1e20, 1e30])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(0, 8)])
def test_one_cholesky_qr_reports_squares_that_float32_does_not_hold(
    size: float, columns: slice
) -> None:
    p = well_conditioned(2, 40, 8)
    p[1, :, columns] *= size
    _, [failed], _ = in_parts(p, ONCE, [0, 40])
    assert failed.tolist() == [False, True]


@pytest.mark.parametrize("bounds", [[0, 40], [0, 20, 40], [0, 1, 2, 39, 40]])
def test_parts_by_one_cholesky_qr_give_the_rows_of_the_whole(bounds: list[int]) -> None:
    p = well_conditioned(3, 40, 8)
    p[1] = conditioned(1, 40, 8, 1e3)
    q, failed, _ = in_parts(p, ONCE, bounds)
    for report in failed:
        assert report.tolist() == [False, True, False]
    assert (q - positive_qr(p))[[0, 2]].abs().max().item() < 1e-5


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown orthonormalizer 'svd'"):
        orthonormal(gaussian(1, 4, 2), "svd")


def in_parts(p: Tensor, method: str, bounds: list[int]) -> tuple[Tensor, list[Tensor], list[int]]:
    """Orthonormalizes rows bounds[i]:bounds[i + 1] apart, summing what they yield.

    Returns:
        The parts' results put together, what each of them reports as failed, and the rows of the
        sums that they asked for.
    """
    batch, n, r = p.shape
    whole = sign_sketch(batch, n)
    parts = [
        orthonormalize_part(
            p[:, a:b], method, lambda rows, a=a, b=b: whole(rows)[:, :, a:b], OVERSAMPLE
        )
        for a, b in pairwise(bounds)
    ]
    asked: list[int] = []
    partial = [next(part) for part in parts]
    while True:
        [shape] = {values.shape for values in partial}
        assert (shape[0], shape[2]) == (batch, r)
        asked.append(shape[1])
        total = torch.stack(partial).sum(dim=0)
        ended, partial = [], []
        for part in parts:
            try:
                partial.append(part.send(total.clone()))
            except StopIteration as end:
                ended.append(end.value)
        if ended:
            assert not partial  # all end together
            return torch.cat([q for q, _ in ended], dim=1), [failed for _, failed in ended], asked


@every_cholesky
@pytest.mark.parametrize(
    ("batch", "n", "r", "bounds"),
    [
        (1, 1, 1, [0, 1]),
        (1, 2, 1, [0, 1, 2]),
        (3, 4, 4, [0, 1, 2, 3, 4]),
        (1, 9, 2, [0, 1, 8, 9]),
        (2, 30, 5, [0, 10, 20, 30]),
        (3, 80, 12, [0, 1, 2, 50, 80]),
        (2, 40, 33, [0, 3, 40]),  # parts with fewer rows than columns
    ],
)
@pytest.mark.parametrize("factor", [1.0, 1e30, 1e-30])
def test_parts_of_rows_give_the_rows_of_the_whole(
    batch: int, n: int, r: int, bounds: list[int], factor: float, method: str
) -> None:
    p = well_conditioned(batch, n, r) * factor
    q, failed, asked = in_parts(p, method, bounds)
    assert not torch.stack(failed).any()
    assert_orthonormal(q)
    assert (q - orthonormal(p, method, fallbacks=0)).abs().max().item() < 1e-5
    assert tuple(asked) == summed_rows(method, r, OVERSAMPLE)


@pytest.mark.parametrize("bounds", [[0, 40], [0, 1, 40], [0, 13, 26, 40]])
def test_parts_of_an_ill_conditioned_matrix_are_as_exact_as_the_whole(bounds: list[int]) -> None:
    p = conditioned(3, 40, 8, 1e5)
    q, failed, _ = in_parts(p, "rcqr", bounds)
    assert not torch.stack(failed).any()
    assert_orthonormal(q)
    distances = (q.double() - positive_qr(p)).norm(dim=1)
    assert (distances / column_tolerances(p)).max().item() < 1


def zero(p: Tensor) -> Tensor:
    return p.zero_()


def zero_column(p: Tensor) -> Tensor:
    p[:, :, -2] = 0
    return p


every_division = pytest.mark.parametrize("bounds", [[0, 20, 40], [0, 1, 2, 39, 40]])


@every_cholesky
@every_division
@pytest.mark.parametrize("degenerate", [zero, zero_column])
def test_all_parts_report_the_broken_matrices(
    degenerate: Callable[[Tensor], Tensor], bounds: list[int], method: str
) -> None:
    p = gaussian(4, 40, 8)
    p[[0, 2]] = degenerate(p[[0, 2]])
    q, failed, _ = in_parts(p, method, bounds)
    for report in failed:
        assert report.tolist() == [True, False, True, False]
    assert (q[[1, 3]] - positive_qr(p[[1, 3]])).abs().max().item() < 1e-5


# Rounding may separate dependent columns; then there is nothing to report.
@every_cholesky
@every_division
@pytest.mark.parametrize("degenerate", [duplicate_columns, low_rank, nearly_dependent])
def test_parts_of_dependent_columns_are_reported_or_orthonormal(
    degenerate: Callable[[Tensor], Tensor], bounds: list[int], method: str
) -> None:
    q, failed, _ = in_parts(degenerate(gaussian(40, 40, 8)), method, bounds)
    for report in failed:
        assert torch.equal(report, failed[0])
    if not failed[0].all():
        # An error in two columns that one probe's signs hide is rarely missed by all four.
        assert_orthonormal(q[~failed[0]], tolerance=5e-5)


@pytest.mark.parametrize(("rank", "rows"), [(1, 9), (8, 16), (32, 40), (40, 50), (100, 125)])
def test_summed_rows_are_small_and_known_beforehand(rank: int, rows: int) -> None:
    triangle = math.ceil((rank + 1) / 2)
    assert summed_rows("rcqr", rank, OVERSAMPLE) == (rows, triangle, 4)
    assert summed_rows("cqr", rank, OVERSAMPLE) == (1, triangle, triangle, 4)
    assert summed_rows(ONCE, rank, OVERSAMPLE) == (triangle,)


@pytest.mark.parametrize(("height", "rank"), [(1, 1), (1, 7), (3, 7), (7, 7), (8, 8), (5, 8)])
def test_packed_triangles_have_no_zeros_to_spare(height: int, rank: int) -> None:
    trapezoids = gaussian(3, height, rank).triu()
    packed = pack(trapezoids)
    assert packed.shape == (3, packed_rows(height, rank), rank)
    numbers = height * rank - height * (height - 1) // 2
    assert 0 <= packed[0].numel() - numbers < rank
    assert torch.equal(unpack(packed, height), trapezoids)
    whole = gaussian(1, height, rank)
    assert torch.equal(unpack(pack(whole), height), whole.triu())


@every_method
@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (1, 5), (4, 6), (6, 6), (30, 6)])
@pytest.mark.parametrize("degenerate", [lambda p: p, zero, duplicate_columns])
def test_factor_is_a_qr_of_any_rows(
    degenerate: Callable[[Tensor], Tensor], rows: int, rank: int, method: str
) -> None:
    p = degenerate(gaussian(4, rows, rank))
    q, triangle, _ = factor(p, method, sign_sketch(4, rows), OVERSAMPLE)
    assert q.shape == (4, rows, min(rows, rank))
    assert_orthonormal(q)
    assert torch.equal(triangle, triangle.triu())
    assert (q @ triangle - p).abs().max() < 1e-5
