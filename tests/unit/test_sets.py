"""Sets of weights that keep the buffers of every rank within a limit."""

import itertools

import pytest
import torch

from megatron_dion import Dion, DionConfig
from megatron_dion.sharding import Grid, Planner, sets_in_turn, sets_within
from megatron_dion.sharding.bounds import bound_of_buffers
from megatron_dion.sharding.memory import peak_bytes
from tests.distributed.test_sharded_dion import ALONE, ODD, TRANSFORMER, Shape, place

GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (2, 4)]
MODELS = {"transformer": TRANSFORMER, "odd": ODD, "alone": ALONE}
CONFIGS = [
    DionConfig(rank_fraction=0.3),
    DionConfig(rank_fraction=0.3, comm_dtype="bf16", right_factor="orth"),
    DionConfig(rank_fraction=0.3, factor_dtype="bf16", orthonormalizer="cqr"),
]


def planner_of(shapes: tuple[Shape, ...], grid: tuple[int, int], config: DionConfig) -> Planner:
    return Planner(place(shapes, *grid, bucket=5000), Grid(*grid), config)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_no_rank_needs_more_than_the_bound(
    grid: tuple[int, int], model: str, replicas: int
) -> None:
    """Nor is the bound, or the sum of those of the weights, far above what the busiest needs."""
    for config in CONFIGS:
        planner = planner_of(MODELS[model], grid, config)
        alone = planner.in_sets([[i] for i in range(len(planner.layout.placements))])
        bound = bound_of_buffers(planner, 0, replicas)
        total = sum(bound_of_buffers(alone, i, replicas) for i in range(len(alone.sets)))
        needs = {r: peak_bytes(planner.plans(r)[0], replicas) for r in planner.layout.grid.ranks()}
        for rank, need in needs.items():
            place_of = rank.data_parallel, rank.tensor_parallel
            assert need <= bound[place_of] <= total[place_of]
        assert total.max() <= 1.25 * max(needs.values())


@pytest.mark.parametrize("grid", GRIDS)
def test_sets_are_as_few_as_the_limit_allows(grid: tuple[int, int]) -> None:
    """Two in flight stay below it; each weight is in one set; less room makes more sets."""
    planner = planner_of(TRANSFORMER, grid, CONFIGS[0])
    indices = range(len(planner.layout.placements))
    ranks = Grid(*grid).size
    in_flight = 1 if ranks == 1 else 2
    alone = planner.in_sets([[i] for i in indices])
    least = in_flight * max(int(bound_of_buffers(alone, i).max()) for i in indices) / 2**20
    seen = []
    for limit in (1.0, 1.5 * least, least):
        sets = sets_within(planner, indices, ranks, limit)
        assert sorted(itertools.chain(*sets)) == list(indices)
        divided = planner.in_sets(sets)
        for rank in planner.layout.grid.ranks():
            needs = [peak_bytes(plan) for plan in divided.plans(rank)]
            assert sum(sorted(needs)[-in_flight:]) <= limit * 2**20
        seen.append(len(sets))
    assert sets_within(planner, indices, ranks, 1.0) == sets_in_turn(
        planner.layout.placements, indices, ranks
    )
    assert in_flight == seen[0] <= seen[1] <= seen[2]
    assert seen[2] > in_flight


def test_least_limit_is_named_and_works() -> None:
    planner = planner_of(TRANSFORMER, (2, 2), CONFIGS[0])
    indices = range(len(planner.layout.placements))
    with pytest.raises(ValueError, match=r"--dion-exchange-buffer-mib 0\.01 is too small") as error:
        sets_within(planner, indices, 4, 0.01)
    least = float(str(error.value).rpartition(" ")[2])
    assert len(sets_within(planner, indices, 4, least)) > 2
    with pytest.raises(ValueError, match="too small"):
        sets_within(planner, indices, 4, least - 0.01)


def test_one_process_has_a_limit_too() -> None:
    parameters = [torch.zeros(64, 64) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.ones(64, 64)
    needed = 2 * 64 * 16 * 4 / 2**20  # of P and R of one matrix
    optimizer = Dion(parameters, exchange_buffer_mib=3 * needed)
    optimizer.step()
    assert [len(chosen.held) for chosen in optimizer.step_sets()] == [3, 3, 2]
