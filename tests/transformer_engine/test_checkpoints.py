"""Checkpoints of weights that Transformer Engine keeps in FP8, into other topologies and bf16."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fp8_emulation.checks import check_forms, masters_of
from tests.transformer_engine.test_weights import kept_now
from tests.worlds import world


def save(folder: Path, recipe: str, sizes_of: str) -> dict[str, Any]:
    """On a rank: trains and saves."""
    from megatron.core import dist_checkpointing

    from tests.transformer_engine.model import Training

    training = Training(recipe, sizes_of)
    for _ in range(2):
        training.step()
        training.amaxes()
    dist_checkpointing.save(training.state(), str(folder))
    return {"weights": kept_now(training), "state": state_of(training)}


def load(folder: Path, recipe: str, sizes_of: str) -> dict[str, Any]:
    """On a rank: loads into other weights."""
    from megatron.core import dist_checkpointing

    from tests.transformer_engine.model import Training

    training = Training(recipe, sizes_of, seed=2)
    before = kept_now(training)
    training.load(dist_checkpointing.load(training.state(is_loading=True), str(folder)))
    amaxes = training.amaxes()
    return {
        "before": before,
        "weights": kept_now(training),
        "state": state_of(training),
        "amaxes": list(map(float, amaxes)),
    }


def state_of(training: Any) -> list[tuple[str, tuple[slice, ...], tuple[int, ...], Tensor]]:
    """Every tensor of the optimizers' state with its place."""
    requests = training.state()["optimizer"]["state"].values()
    return [(one.key, one.global_slice(), one.global_shape, one.data.clone()) for one in requests]


def whole(ranks: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The state by names, from the pieces of all ranks."""
    found: dict[str, Tensor] = {}
    for key, place, shape, data in (piece for rank in ranks for piece in rank["state"]):
        found.setdefault(key, torch.full(shape, torch.nan))[place] = data
    assert all(tensor.isfinite().all() for tensor in found.values())
    return found


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
def test_state_survives_and_weights_are_made_of_it(
    tmp_path: Path, saved: str, loads: tuple[str, ...]
) -> None:
    sizes_of = "mxfp8" if "mxfp8" in loads else ""
    first = world(4).fork_in_group(save, tmp_path, saved, sizes_of)
    expected = whole(first)
    assert any("right_factor" in key for key in expected)
    masters = masters_of([rank["weights"] for rank in first])
    for recipe in loads:
        then = world(2).fork_in_group(load, tmp_path, recipe, sizes_of)
        found = whole(then)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
        weights = [rank["weights"] for rank in then]
        if recipe != "bf16":
            check_forms(recipe, weights, masters_of([rank["before"] for rank in then]))
        largest = [float(master.bfloat16().abs().max()) for master in masters.values()]
        assert all(rank["amaxes"] == largest for rank in then if recipe == "delayed")
        for one in (one for rank in weights for one in rank if recipe == "bf16"):
            assert torch.equal(one.values, masters[one.name, 0].bfloat16()), one.name
