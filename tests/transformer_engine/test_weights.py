"""Weights kept in FP8 by Transformer Engine itself, with kernels that torch computes.

Bytes and scales on every rank are compared with those of whole weights, as in
tests/fp8_emulation/checks.py, which has the arithmetic.
"""

import itertools
from typing import Any

import pytest
import torch

from tests.fp8_emulation.checks import RECIPES, RankWeight, check_forms, masters_of, weights_of
from tests.worlds import world

STEPS = 4


def weights_now(training: Any) -> list[RankWeight]:
    from tests.transformer_engine.model import forms_of

    return weights_of(training.weights, training.optimizer, forms_of)


def train(recipe: str, is_hopper: bool) -> dict[str, Any]:
    """On a rank: what there is of each weight before the first step and after each."""
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    from tests.transformer_engine.model import Training

    if is_hopper:  # where weights are kept transposed too
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
    is_non_tn_fp8_gemm_supported.cache_clear()
    training = Training(recipe)
    recorded = [weights_now(training)]
    amaxes = []
    for _ in range(STEPS):
        training.step()
        recorded.append(weights_now(training))
        amaxes.append(training.amaxes())
    assert not any(weight._transpose_invalid for weight in training.weights if is_hopper)
    routes = training.optimizer.routing_table.routes
    return {"weights": recorded, "amaxes": amaxes, "routes": routes}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("recipe", "is_hopper"),
    [*((recipe, False) for recipe in RECIPES), ("delayed", True), ("tensorwise", True)],
)
def test_bytes_and_scales_are_those_of_whole_weights(
    recipe: str, is_hopper: bool, ranks: int
) -> None:
    found = world(ranks).run(train, recipe, is_hopper)
    steps = [[rank["weights"][step] for rank in found] for step in range(STEPS + 1)]
    cuts = {one.start % one.values.shape[1] for rank in steps[0] for one in rank}
    assert any(cut % 128 for cut in cuts), "no cut is within a row, and a block"
    for number, (before, after) in enumerate(itertools.pairwise(steps)):
        assert not torch.equal(before[0][0].values, after[0][0].values)
        check_forms(recipe, after, masters_of(before))
        largest = [master.bfloat16().abs().max() for master in masters_of(after).values()]
        for rank in found if recipe == "delayed" else []:
            assert [float(amax) for amax in rank["amaxes"][number]] == list(map(float, largest))
    routes = found[0]["routes"]
    assert sum(route.weight is not None for route in routes) == 3
    assert all((route.weight is not None) == ("kept in FP8" in route.reason) for route in routes)
