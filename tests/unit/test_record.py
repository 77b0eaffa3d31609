from dataclasses import replace
from typing import Any

import pytest

from megatron_dion import DionConfig
from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.optimizer.record import FORMAT, Record
from megatron_dion.optimizer.rules import RoutingRules

RECORD = Record(DionConfig(seed=7), RoutingRules(exclude=("*.0.*",)), "adam")
SAVED = RECORD.to_dict()


def read(**changes: Any) -> Record:
    record = Record.of_state({"dion": SAVED | changes})
    assert record is not None
    return record


def test_survives_being_written() -> None:
    assert read() == RECORD
    assert not any(RECORD.differences(RECORD).values())
    assert Record.of_state({"param_groups": []}) is None
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}, .* up to {FORMAT}: install"):
        read(format=FORMAT + 1)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"rank_fraction": 0.5}, "factors", "--dion-rank-fraction 0.25 (saved), 0.5 (here)"),
        ({"rank_multiple_of": 8}, "factors", "--dion-rank-multiple-of 1 (saved), 8 (here)"),
        ({"scale_mode": "dion"}, "rates", "--dion-scale-mode spectral (saved), dion (here)"),
        ({"extra_scale_factor": 2}, "rates", "--dion-extra-scale-factor 1.0 (saved), 2 (here)"),
        ({"momentum": 0.9}, "free", "--dion-momentum 0.95 (saved), 0.9 (here)"),
        ({"seed": 8}, "free", "--seed 7 (saved), 8 (here)"),
    ],
)
def test_differences_of_hyperparameters(change: dict[str, Any], kind: str, said: str) -> None:
    found = RECORD.differences(replace(RECORD, config=replace(RECORD.config, **change)))
    assert {meaning: line for meaning, line in found.items() if line} == {kind: said}


def test_differences_of_rules_and_of_the_scalar_optimizer() -> None:
    assert RECORD.differences(Record(RECORD.config, RoutingRules(split=frozenset()), "lion")) == {
        "factors": "--dion-split gate,qkv (saved), none (here)",
        "routes": "--dion-exclude *.0.* (saved), none (here)",
        "scalars": "--dion-scalar-optimizer adam (saved), lion (here)",
        "rates": "",
        "free": "",
    }


@pytest.mark.parametrize("kind", ["colnorm", "orth"])
def test_record_of_an_earlier_version(kind: str) -> None:
    """Its hyperparameters that are gone are left out; only another kind of Q matters."""
    gone = {"orthonormalizer": "cqr", "oversample": 1.25, "right_factor": kind}
    found = read(config=SAVED["config"] | gone).differences(RECORD)
    orth = {"factors": "--dion-right-factor orth (saved), colnorm (here)"}
    assert {meaning: line for meaning, line in found.items() if line} == (
        orth if kind == "orth" else {}
    )
