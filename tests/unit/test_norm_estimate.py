"""The random projection behind the gradient norm of compressed sync."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dion.optimizer.norm_estimate import DRAWS, WIDTH, project

REPEATS = 100


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(gradients: list[Tensor]) -> Tensor:
    """A of the docstring, built apart: (rows, WIDTH) float64."""
    padded = [torch.nn.functional.pad(g.flatten(), (0, -g.numel() % WIDTH)) for g in gradients]
    return torch.cat(padded).double().view(-1, WIDTH)


KINDS: dict[str, Callable[[], list[Tensor]]] = {
    "full rank": lambda: [normal(60, 4096)],
    "rank one": lambda: [normal(60, 1) @ normal(1, 4096, seed=1)],
    "equal rows": lambda: [torch.ones(40, WIDTH)],
    "several": lambda: [normal(n, seed=n) for n in (1, 7000, 50_000, 3, WIDTH, 2 * WIDTH + 5)],
    "equal gradients": lambda: [normal(20_000)] * 5,
    "one large element": lambda: [normal(3, WIDTH) * 1e-3 + torch.eye(3, WIDTH)[1:2]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_squared_norm_has_the_derived_mean_and_deviation(kind: str) -> None:
    gradients = KINDS[kind]()
    a = rows_of(gradients)
    gram = a @ a.T
    total = float(a.square().sum())
    exact = math.sqrt(2 / DRAWS) * float((gram - gram.diag().diag()).norm()) / total
    found = torch.stack(
        [project(gradients, 0, f"draw {i}").double().square().sum() / total for i in range(REPEATS)]
    )
    assert abs(float(found.mean()) - 1) < 4 * exact / math.sqrt(REPEATS) + 1e-5
    assert 0.75 * exact - 1e-5 < float(found.std()) < 1.25 * exact + 1e-5


def test_gradients_of_low_rank_are_many_directions() -> None:
    """A gradient of rank one at a usual width is estimated as well as one of full rank."""
    for width in (1024, 4096, 8192):
        a = rows_of([normal(100 * 4096 // width, 1) @ normal(1, width, seed=1)])
        assert float(a.square().sum()) ** 2 / float((a @ a.T).square().sum()) > 20


def test_projection_of_a_sum_is_the_sum_of_projections() -> None:
    one, other = ([normal(n, seed=seed) for n in (5000, 1, 20_000)] for seed in (1, 2))
    both = [a - 3 * b for a, b in zip(one, other, strict=True)]
    expected = project(one, 7, "x") - 3 * project(other, 7, "x")
    torch.testing.assert_close(project(both, 7, "x"), expected, rtol=1e-5, atol=1e-5)


def test_seed_and_purpose_decide_and_nothing_gives_zeros() -> None:
    gradients = [normal(9000), normal(500, seed=1)]
    first = project(gradients, 0, "norm/1")
    assert torch.equal(first, project(gradients, 0, "norm/1"))
    assert not torch.equal(first, project(gradients, 0, "norm/2"))
    assert not torch.equal(first, project(gradients, 1, "norm/1"))
    for nothing in ([], [torch.zeros(0)], [torch.zeros(9)]):
        assert torch.equal(project(nothing, 0, "x"), torch.zeros(DRAWS, WIDTH))
