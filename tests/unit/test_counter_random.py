from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dion.algorithm.counter_random import normal, signs

Generate = Callable[[int, str, Tensor, int], Tensor]
both = pytest.mark.parametrize("generate", [normal, signs])
SAMPLE = torch.arange(4000)

# Of seed 1234, purpose "layer.weight"; rows 0, 7, 2^33 and rows 0, 7.
PINNED_NORMAL = [
    [-0.36413872241973877, 0.4720483124256134],
    [0.15955185890197754, 0.5525510311126709],
    [0.03795203939080238, -0.9662441611289978],
]
PINNED_SIGNS = ["+-++++-+", "---+++-+"]


@both
def test_a_row_is_the_same_in_whatever_company(generate: Generate) -> None:
    whole = generate(3, "w", torch.arange(50), 70)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for rows in (shuffled, torch.arange(17, 31), torch.tensor([49]), torch.tensor([5, 5, 0])):
        assert torch.equal(generate(3, "w", rows, 70), whole[rows])
    assert generate(3, "w", torch.arange(0), 70).shape == (0, 70)


@both
@pytest.mark.parametrize("columns", [1, 3, 63, 64, 65, 128])
def test_first_columns_do_not_depend_on_how_many_follow(generate: Generate, columns: int) -> None:
    rows = torch.arange(9)
    few = generate(0, "w", rows, columns)
    assert few.shape == (9, columns)
    assert few.dtype == torch.float32
    assert torch.equal(few, generate(0, "w", rows, 200)[:, :columns])


def test_normal_has_the_moments_of_a_sum_of_four_uniforms() -> None:
    values = normal(0, "moments", SAMPLE, 25).double().flatten()  # 100 thousand
    deviations = 5 / values.numel() ** 0.5
    assert abs(values.mean().item()) < deviations
    assert abs(values.var().item() - 1) < deviations * 1.7**0.5  # var(x^2) = kurtosis - 1
    assert abs(values.pow(3).mean().item()) < deviations * 3
    assert abs(values.pow(4).mean().item() - 2.7) < deviations * 8  # 3 - 1.2 / 4, Irwin-Hall
    assert 3 < values.abs().max().item() <= 12**0.5


def test_signs_are_balanced() -> None:
    values = signs(0, "balance", SAMPLE, 64)
    assert set(values.unique().tolist()) == {-1.0, 1.0}
    assert abs(values.mean().item()) < 5 / values.numel() ** 0.5
    assert values.mean(dim=0).abs().max().item() < 5 / len(SAMPLE) ** 0.5


def test_definitions_are_pinned() -> None:
    """Numbers that ever change would make another run of an old command."""
    rows = torch.tensor([0, 7, 2**33])
    assert torch.equal(normal(1234, "layer.weight", rows, 2), torch.tensor(PINNED_NORMAL))
    drawn = signs(1234, "layer.weight", rows[:2], 8)
    assert ["".join("+" if x > 0 else "-" for x in row) for row in drawn.tolist()] == PINNED_SIGNS
