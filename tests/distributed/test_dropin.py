"""Scripts that know nothing of this project, with `--optimizer dion`."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses, read_metrics

SCRIPT = Path(__file__).with_name("foreign_pretrain.py")
# The script takes its data from nowhere else, and has a default for the tokenizer.
FLAGS = [flag for flag in [*MODEL, *TRAINING] if flag not in ("--tokenizer-type", "NullTokenizer")]
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()
RUN = [*TP2, *"--train-iters 4 --micro-batch-size 3".split()]


def run_script(flags: Sequence[str]) -> None:
    """On a rank: what `python -m megatron_dion.run` does where megatron is to be imported yet."""
    from megatron_dion.training.join import Join

    Join("cpu", script_is_ours=False).install()
    run_stock(flags)


def run_stock(flags: Sequence[str]) -> None:
    """On a rank: the script as it is, but for the flags that stand for the CPU."""
    sys.argv = [str(SCRIPT), *flags]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def own_losses(nursery: Nursery, folder: Path, *flags: str) -> list[float]:
    nursery.pretrain(4, *RUN, *flags, "--run-dir", str(folder))
    return losses(folder)


@pytest.mark.parametrize("model_by", ["config", "provider"])
def test_losses_are_those_of_our_script(
    nursery: Nursery, tmp_path: Path, model_by: str
) -> None:
    expected = own_losses(nursery, tmp_path / "own", *DION)
    flags = [*FLAGS, *RUN, *DION, "--model-by", model_by, "--run-dir", str(tmp_path / "foreign")]
    nursery.run(4, run_script, flags)
    assert losses(tmp_path / "foreign") == expected
    names = {path.name for path in (tmp_path / "foreign").iterdir()}
    assert names == {path.name for path in (tmp_path / "own").iterdir()}
    tables = [(tmp_path / name / "routing.tsv").read_text() for name in ("own", "foreign")]
    assert tables[0] == tables[1]
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    assert config["command_line"] == [str(SCRIPT), *flags]
