"""The short cases pass, and notice every mistake that is made on purpose."""

import subprocess
import sys
from pathlib import Path

from tests.project import ROOT, words_from_make

MODULE = ["-m", "megatron_dion", "convergence"]


def test_short_cases_and_their_mistakes(tmp_path: Path) -> None:
    """What `make convergence` does to all cases; then one more look, at the file of the page."""
    assert words_from_make("convergence") == [*MODULE, "check", "--controls"]
    run("check", "--short", "--controls", "--output", str(tmp_path))
    assert (tmp_path / "report.html").exists()
    run("report", "tests/convergence/topologies.yaml", "--controls", "--output", str(tmp_path))


def run(*words: str) -> None:
    """The command, which finds nothing wrong."""
    command = [sys.executable, *MODULE, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "NOT NOTICED" not in done.stdout
