"""Programs in examples/, as they are."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dion_tools.local.world import RankError
from tests.worlds import world

CORE_LOOP = Path(__file__).parents[2] / "examples" / "core_loop.py"


def output_of(script: Path, flags: list[str]) -> str:
    """On a rank: what a program says."""
    sys.argv = [str(script), *flags]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return said.getvalue()


def core_loop(ranks: int, flags: str) -> list[float]:
    """The losses that the loop on megatron.core prints."""
    said, *others = world(ranks).fork(output_of, CORE_LOOP, flags.split())
    assert not any(others)
    return [float(loss) for loss in re.findall(r"iteration \d+: loss (\S+),", said)]


def test_core_loop_learns_and_goes_on_elsewhere(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint"
    whole = core_loop(1, "--iterations 80")
    first = core_loop(4, f"--tp 2 --iterations 12 --save {saved}")
    then = core_loop(2, f"--iterations 16 --load {saved}")
    assert len(first) == 12
    differences = [abs(a - b) for a, b in zip([*first, *then], whole[:16], strict=True)]
    assert max(differences) < 2e-5
    assert whole[-1] < whole[0] - 0.5
    with pytest.raises(RankError, match="is there already: name a new folder"):
        core_loop(1, f"--save {saved}")


@pytest.mark.slow
def test_core_loop_is_started_by_torchrun() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone, together = (
        subprocess.run(
            [sys.executable, *start, str(CORE_LOOP), "--iterations", "1"],
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "LOCAL_RANK"},
        )
        for start in ([], launcher)
    )
    assert (alone.returncode, together.returncode) == (2, 0), together.stderr
    assert alone.stderr.endswith("error: start it with torchrun\n")
    assert "iteration 1: loss " in together.stdout
