"""A checkpoint of an older revision loads, on other topologies too, and its run goes on."""

import json
from pathlib import Path

import pytest

from tests.distributed.tiny_gpt import losses
from tests.project import ROOT
from tests.worlds import world

FOLDER = ROOT / "tests" / "data" / "checkpoint_6012ac3"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("topology", EXPECTED["continued"])
def test_the_run_of_an_old_checkpoint_goes_on(tmp_path: Path, topology: str) -> None:
    """The old code's losses on the same topology; TP2 x DP2 wrote the checkpoint."""
    expected = EXPECTED["continued"][topology]
    flags = f"{EXPECTED['flags']} {expected['flags']} --train-iters 10 --load {FOLDER}"
    world(expected["ranks"]).train(*flags.split(), "--run-dir", str(tmp_path))
    assert losses(tmp_path) == pytest.approx(expected["losses"], rel=0, abs=2e-5)
