"""The short cases pass, and notice every mistake that is made on purpose."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_short_cases_and_their_mistakes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_dion", "convergence", "check", "--short"]
    command += ["--controls", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "report.html").exists()
    assert "NOT NOTICED" not in done.stdout
