from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dion.algorithm import count_sketch as module
from megatron_dion.algorithm.count_sketch import BUCKETS, count_sketch

NUMEL = 100_000


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def integers(numel: int, seed: int) -> Tensor:
    """Sums of these are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, (numel,), generator=generator).float()


def few_large() -> list[Tensor]:
    vector = normal(NUMEL) * 1e-3
    vector[[3, 500, 77_777, 99_999]] = torch.tensor([10.0, -30.0, 20.0, 5.0])
    return [vector]


def rank_one() -> list[Tensor]:
    return [torch.outer(normal(250), normal(400, 1)).flatten()]


def several() -> list[Tensor]:
    return [normal(numel, numel) for numel in (1, 7000, 50_000, 3, 42_996)]


KINDS: dict[str, Callable[[], list[Tensor]]] = {
    "normal": lambda: [normal(NUMEL)],
    "a few large elements": few_large,
    "rank one": rank_one,
    "several tensors": several,
    "equal tensors": lambda: [normal(20_000)] * 5,
}


@pytest.mark.parametrize("tensors", KINDS.values(), ids=KINDS)
def test_norm_is_kept_in_nearly_all_draws(tensors: Callable[[], list[Tensor]]) -> None:
    drawn = tensors()
    norm = torch.cat(drawn).double().norm()
    ratios = [count_sketch(drawn, 0, f"draw {i}").double().norm() / norm for i in range(100)]
    found = torch.stack(ratios)
    assert ((found - 1).abs() < 0.03).sum() >= 99
    assert len(set(found.tolist())) > 50 or tensors is few_large  # these are draws


def test_sketch_of_a_sum_is_the_sum_of_sketches() -> None:
    sizes = (5000, 1, 20_000)
    one = [integers(numel, 1) for numel in sizes]
    other = [integers(numel, 2) for numel in sizes]
    both = [a - 3 * b for a, b in zip(one, other, strict=True)]
    expected = count_sketch(one, 7, "x") - 3 * count_sketch(other, 7, "x")
    assert torch.equal(count_sketch(both, 7, "x"), expected)


def test_purpose_and_seed_decide() -> None:
    tensors = [normal(1000), normal(500, 1)]
    first = count_sketch(tensors, 0, "norm/1")
    assert first.shape == (BUCKETS,)
    assert first.dtype == torch.float32
    assert torch.equal(first, count_sketch(tensors, 0, "norm/1"))
    assert not torch.equal(first, count_sketch(tensors, 0, "norm/2"))
    assert not torch.equal(first, count_sketch(tensors, 1, "norm/1"))


def test_every_element_goes_to_one_bucket_with_a_sign() -> None:
    sketches = [count_sketch([unit], 0, "x") for unit in torch.eye(50)]
    assert all(sketch.abs().sum() == 1 == sketch.abs().max() for sketch in sketches)
    assert {sketch.sum().item() for sketch in sketches} == {-1.0, 1.0}
    assert len({int(sketch.abs().argmax()) for sketch in sketches}) > 45


@pytest.mark.parametrize("tensors", [[], [torch.zeros(0)], [torch.zeros(9)]])
def test_nothing_gives_zeros(tensors: list[Tensor]) -> None:
    assert torch.equal(count_sketch(tensors, 0, "x"), torch.zeros(BUCKETS))


@pytest.mark.parametrize("length", [1000, 999, 4096, 19_999])
def test_long_tensors_in_slices_give_the_same(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    tensors = [integers(20_000, 0), integers(1000, 1), integers(4097, 2)]
    whole = count_sketch(tensors, 0, "x")
    monkeypatch.setattr(module, "_SLICE", length)
    assert torch.equal(count_sketch(tensors, 0, "x"), whole)
