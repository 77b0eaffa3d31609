"""The short cases pass, and notice every mistake that is made on purpose."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_short_cases_and_their_mistakes(tmp_path: Path) -> None:
    shown = "convergence check --short --controls"
    assert f"megatron-dion {shown}" in (ROOT / "docs" / "convergence.md").read_text()
    command = [sys.executable, "-m", "megatron_dion", *shown.split(), "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "report.html").exists()
    assert "NOT NOTICED" not in done.stdout
