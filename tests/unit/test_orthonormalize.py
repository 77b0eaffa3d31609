import math

import pytest
import torch
from torch import Tensor

from megatron_dion.algorithm import orthonormalize as module
from megatron_dion.algorithm.orthonormalize import orthonormalize
from tests.reference import orthonormal_columns

SHAPES = [(1, 40, 4), (3, 24, 16), (2, 5, 5), (1, 7, 1), (1, 300, 200), (2, 129, 65)]


@pytest.fixture(autouse=True, params=["calls of a CPU", "calls of a GPU"])
def _calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "GPU" in request.param:
        monkeypatch.setattr(module, "is_cpu", lambda _: False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_condition(batch: int, n: int, r: int, condition: float) -> Tensor:
    left, right = torch.linalg.qr(draw(batch, n, r))[0], torch.linalg.qr(draw(batch, r, r))[0]
    return left * torch.logspace(0, -math.log10(condition), r) @ right


def one_process(tensor: Tensor, operation: object) -> None:
    """Combines the rows of a single process."""


def orthonormal(p: Tensor) -> Tensor:
    """The result for a batch (batch, n, r), which must be finite and orthonormal or zero."""
    q = p.clone()
    orthonormalize([q], one_process)
    assert q.isfinite().all()
    is_zero = q.norm(dim=1) == 0
    for matrix, zero in zip(q, is_zero, strict=True):
        error = matrix.T @ matrix - torch.diag((~zero).float())
        assert error.abs().max() < 1e-3
    return q


def expected(p: Tensor) -> Tensor:
    return torch.stack([orthonormal_columns(matrix.double()) for matrix in p])


@pytest.mark.parametrize(("batch", "n", "r"), SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_the_q_with_positive_diagonal(batch: int, n: int, r: int, size: float) -> None:
    p = with_condition(batch, n, r, 30)
    q, u = torch.linalg.qr(p.double())
    q = q * torch.where(u.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).unsqueeze(1)
    assert (orthonormal(p * size).double() - q).abs().max() < 2e-5


@pytest.mark.parametrize(("condition", "tolerance"), [(1e3, 1e-4), (1e4, 1e-3)])
def test_ill_conditioned(condition: float, tolerance: float) -> None:
    """The error is that of P, which is rounded to float32, times the condition number."""
    p = with_condition(2, 300, 80, condition)
    assert (orthonormal(p) - expected(p)).abs().max() < tolerance


def test_lengths_of_columns_do_not_matter() -> None:
    p = with_condition(2, 60, 20, 10)
    scaled = orthonormal(p * torch.logspace(4, -1, 20))
    torch.testing.assert_close(scaled, orthonormal(p), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize(("n", "r"), [(300, 80), (50, 80), (2000, 41), (600, 512)])
def test_dependent_columns_are_zero_whatever_the_order_of_sums(n: int, r: int, rank: int) -> None:
    """P = B^T Q in two orders of summation, with rounding of float32 in every column."""
    b, q = draw(512, rank) @ draw(rank, n, seed=1), draw(512, r, seed=2)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(3))
    one = orthonormal((b.T @ q).unsqueeze(0))[0]
    other = orthonormal(sum(b[i].T @ q[i] for i in order.chunk(7)).unsqueeze(0))[0]
    zero = torch.tensor([False] * rank + [True] * (r - rank))
    assert torch.equal(one.norm(dim=0) == 0, zero)
    torch.testing.assert_close(one, other, rtol=0, atol=3e-5)


@pytest.mark.parametrize("numbers", [1, 130, module.GRAM_NUMBERS])
def test_batches_of_the_same_rank_do_not_disturb_each_other(
    monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    monkeypatch.setattr(module, "GRAM_NUMBERS", numbers)
    batches = [draw(2, 40, 8), draw(1, 30, 5), draw(3, 24, 8), draw(1, 300, 300)]
    alone = [orthonormal(p) for p in batches]
    orthonormalize(batches, one_process)
    for p, one in zip(batches, alone, strict=True):
        torch.testing.assert_close(p, one, rtol=0, atol=1e-5)


def test_ranks_reduce_the_same_matrices_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rows of them make other batches."""
    monkeypatch.setattr(module, "GRAM_NUMBERS", 130)
    reduced: list[list[int]] = [[], []]
    for sizes, (first, second) in zip(reduced, [(2, 3), (4, 1)], strict=True):
        batches = [draw(first, 30, 8), draw(second, 29, 8), draw(3, 40, 5), draw(1, 40, 12)]
        orthonormalize(batches, lambda tensor, _, sizes=sizes: sizes.append(len(tensor)))
    assert reduced[0] == reduced[1] == [9, 144, 144, 128, 128, 128, 128, 114, 114, 25, 25]


def test_dependent_columns_between_others() -> None:
    p = draw(1, 300, 80)
    p[:, :, 20] = p[:, :, 5] + p[:, :, 7]
    p[:, :, 40] = p[:, :, 3]
    p[:, :, 60] = 0
    q = orthonormal(p)
    assert (q[0].norm(dim=0) == 0).nonzero().flatten().tolist() == [20, 40, 60]
    assert (q - expected(p)).abs().max() < 5e-5


def test_a_broken_matrix_leaves_the_others_alone() -> None:
    p = draw(3, 40, 8)
    alone = orthonormal(p[:1])
    p[1], p[2, 0, 0] = 0, math.nan
    orthonormalize([p], one_process)
    torch.testing.assert_close(p[:1], alone, rtol=0, atol=1e-7)
    assert not p[1].any()
