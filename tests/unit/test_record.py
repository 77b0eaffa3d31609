from dataclasses import replace
from typing import Any

import pytest

from megatron_dion import DionConfig
from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.optimizer.record import FORMAT, Record
from megatron_dion.optimizer.rules import RoutingRules

RECORD = Record(DionConfig(seed=7), RoutingRules(exclude=("*.0.*",)), "adam")


def test_survives_being_written() -> None:
    assert Record.from_dict(RECORD.to_dict()) == RECORD


def test_same_run_has_no_differences() -> None:
    found = RECORD.differences(RECORD)
    assert not any((found.factors, found.routes, found.scalars, found.free))


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"rank_fraction": 0.5}, "factors", "--dion-rank-fraction 0.25 (saved), 0.5 (here)"),
        ({"rank_multiple_of": 8}, "factors", "--dion-rank-multiple-of 1 (saved), 8 (here)"),
        ({"momentum": 0.9}, "free", "--dion-momentum 0.95 (saved), 0.9 (here)"),
        ({"seed": 8}, "free", "--seed 7 (saved), 8 (here)"),
    ],
)
def test_differences_of_hyperparameters(change: dict[str, Any], kind: str, said: str) -> None:
    found = RECORD.differences(replace(RECORD, config=replace(RECORD.config, **change)))
    assert getattr(found, kind) == (said,)
    others = {"factors", "routes", "scalars", "free"} - {kind}
    assert not any(getattr(found, other) for other in others)


def test_differences_of_rules_and_of_the_scalar_optimizer() -> None:
    here = Record(RECORD.config, RoutingRules(split=frozenset()), "lion")
    found = RECORD.differences(here)
    assert found.factors == ("--dion-split gate,qkv (saved), none (here)",)
    assert found.routes == ("--dion-exclude *.0.* (saved), none (here)",)
    assert found.scalars == ("--dion-scalar-optimizer adam (saved), lion (here)",)


@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
def test_record_of_an_earlier_version(right_factor: str) -> None:
    """Its hyperparameters that are gone are left out; only another kind of Q matters."""
    values = RECORD.to_dict()
    gone = {"orthonormalizer": "cqr", "oversample": 1.25, "right_factor": right_factor}
    saved = Record.from_dict(values | {"config": values["config"] | gone})
    assert (saved.config, saved.rules) == (RECORD.config, RECORD.rules)
    found = saved.differences(RECORD)
    orth = ("--dion-right-factor orth (saved), colnorm (here)",)
    assert found.factors == (orth if right_factor == "orth" else ())
    assert not any((found.routes, found.scalars, found.free))


def test_later_format() -> None:
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}, .* up to {FORMAT}: install"):
        Record.from_dict(RECORD.to_dict() | {"format": FORMAT + 1})
