"""Checkpoints of older revisions load, on other topologies too, and their runs go on."""

import json
from pathlib import Path

import pytest

from tests.distributed.tiny_gpt import losses
from tests.project import ROOT
from tests.worlds import world

DATA = ROOT / "tests" / "data"
EXPECTED = {
    name: json.loads((DATA / name / "expected.json").read_text())
    for name in ("checkpoint_6012ac3", "checkpoint_rows")
}


@pytest.mark.parametrize(
    ("name", "topology"),
    [(name, topology) for name, expected in EXPECTED.items() for topology in expected["continued"]],
)
def test_the_run_of_an_old_checkpoint_goes_on(tmp_path: Path, name: str, topology: str) -> None:
    """The old code's losses on the same topology; TP2 x DP2 wrote the checkpoint."""
    expected = EXPECTED[name]["continued"][topology]
    flags = f"{EXPECTED[name]['flags']} {expected['flags']} --train-iters 10 --load {DATA / name}"
    world(expected["ranks"]).train(*flags.split(), "--run-dir", str(tmp_path))
    assert losses(tmp_path) == pytest.approx(expected["losses"], rel=0, abs=2e-5)
