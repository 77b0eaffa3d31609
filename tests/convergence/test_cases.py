"""The cases of the project: their checks pass, and every planted mistake is noticed."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dion_tools.convergence.curves import VALIDATION_LOSS, read_curves
from megatron_dion_tools.convergence.study import estimate
from tests.project import ROOT, words_from_make

GOLDEN = ROOT / "tests" / "convergence" / "golden"
COMMAND = ["-m", "megatron_dion_tools", "convergence", "check"]


def test_make_checks_all_cases() -> None:
    assert words_from_make("convergence") == COMMAND


@pytest.mark.slow
def test_topologies_and_their_mistakes(tmp_path: Path) -> None:
    command = [sys.executable, *COMMAND, "tests/convergence/topologies.yaml"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count(" noticed ") == 7
    assert (tmp_path / "topologies.png").exists()


def test_full_rank_is_ahead_of_adamw_beyond_its_interval() -> None:
    """In the golden curves, which `megatron-dion convergence check` finds again."""

    def last(name: str, seed: int) -> float:
        path = GOLDEN / "optimizers" / name / f"seed-{seed}.jsonl"
        return list(read_curves(path, name).curve(VALIDATION_LOSS).values())[-1]

    gap = estimate([last("full rank", seed) - last("AdamW", seed) for seed in (1, 2, 3)])
    assert gap["mean"] + gap["margin"] < -0.05
