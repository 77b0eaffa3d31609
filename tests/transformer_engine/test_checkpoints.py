"""Checkpoints of weights that Transformer Engine keeps in FP8, into other topologies and bf16."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fp8_emulation.checks import RankWeight, check_forms, masters_of
from tests.transformer_engine.test_weights import weights_now
from tests.worlds import world


def save(folder: Path, recipe: str, sizes_of: str) -> list[RankWeight]:
    """On a rank: trains and saves; what there is of each weight."""
    from megatron.core import dist_checkpointing

    from tests.transformer_engine.model import Training

    training = Training(recipe, sizes_of)
    for _ in range(2):
        training.step()
        training.amaxes()
    dist_checkpointing.save(training.state(), str(folder))
    return weights_now(training)


def load(folder: Path, recipe: str, sizes_of: str) -> dict[str, Any]:
    """On a rank: loads into other weights."""
    from megatron.core import dist_checkpointing

    from tests.transformer_engine.model import Training

    training = Training(recipe, sizes_of, seed=2)
    before = weights_now(training)
    training.load(dist_checkpointing.load(training.state(is_loading=True), str(folder)))
    amaxes = training.amaxes()
    return {
        "before": before,
        "weights": weights_now(training),
        "amaxes": list(map(float, amaxes)),
    }


@pytest.mark.parametrize(
    ("saved", "loads"),
    [
        ("delayed", ("delayed", "blockwise", "bf16")),
        ("tensorwise", ("tensorwise", "bf16")),
        ("blockwise", ("blockwise", "bf16")),
        ("mxfp8", ("mxfp8", "bf16")),
        ("bf16", ("delayed", "tensorwise", "blockwise")),
        ("bf16", ("mxfp8",)),
    ],
)
def test_masters_survive_and_weights_are_made_of_them(
    tmp_path: Path, saved: str, loads: tuple[str, ...]
) -> None:
    sizes_of = "mxfp8" if "mxfp8" in loads else ""
    first = world(4).run(save, tmp_path, saved, sizes_of)
    masters = masters_of(first)
    for recipe in loads:
        then = world(2).run(load, tmp_path, recipe, sizes_of)
        weights = [rank["weights"] for rank in then]
        found = masters_of(weights)
        assert found.keys() == masters.keys()
        assert all(torch.equal(master, masters[key]) for key, master in found.items())
        if recipe != "bf16":
            check_forms(recipe, weights, masters_of([rank["before"] for rank in then]))
        largest = [float(master.bfloat16().abs().max()) for master in masters.values()]
        assert all(rank["amaxes"] == largest for rank in then if recipe == "delayed")
        for one in (one for rank in weights for one in rank if recipe == "bf16"):
            assert torch.equal(one.values, masters[one.name, 0].bfloat16()), one.name
