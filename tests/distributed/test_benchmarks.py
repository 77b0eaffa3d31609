"""Every benchmark with the smallest sizes: what it wrote, never how long anything took."""

import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import benchmarks.memory
import benchmarks.sharded
import benchmarks.step
import benchmarks.traffic
from benchmarks import _common
from benchmarks._models import gpt
from tests.worlds import in_host

NUMEL = sum(w.rows * w.columns for w in gpt(128, 1).weights([0]))


def tables_of(folder: Path, program: ModuleType, flags: str) -> dict[str, Any]:
    """What a program's `main` writes, in the process that can fork ranks of Megatron."""
    output = folder / "result.json"
    argv = [*shlex.split(flags), "--repeats", "1", "--device", "cpu", "--output", str(output)]
    in_host(program.main, argv)
    result = json.loads(output.read_text())
    assert {"processor", "cores", "torch", "revision"} <= result["machine"].keys()
    tables: dict[str, Any] = result["tables"]
    return tables


def test_ratios_are_those_of_the_same_round() -> None:
    drifting = [1.0, 2.0, 8.0, 3.0]
    assert _common.ratio([2.0, 4.0, 16.0, 6.0], drifting) == _common.Summary(2, 2, 2)
    assert _common.ratio([5.0, 1, 2, 4, 3], [1.0] * 5) == _common.Summary(3, 2, 4)


def test_step(tmp_path: Path) -> None:
    flags = "--matrices 2x24 3x16 --hidden 64 --fractions 1/4 1/16"
    tables = tables_of(tmp_path, benchmarks.step, flags)
    floor, weights = tables["floor"], tables["weights"]
    assert [(row["matrices"], row["rank"]) for row in floor] == [
        *(("2 x 24", 6), ("2 x 24", 2), ("3 x 16", 4), ("3 x 16", 1)),
    ]
    for row in floor:
        floor_ms = row["products_ms"] + row["orthonormalize_ms"]
        assert row["step_to_floor"] == pytest.approx(row["step_ms"] / floor_ms)
    assert [row["optimizer"] for row in weights] == [
        *("AdamW", "Muon", "Muon, fp32 products"),
        *("Dion 1/16", "Dion 1/16, residual", "Dion 1/4", "Dion 1/4, residual"),
    ]


def test_sharded(tmp_path: Path) -> None:
    flags = "--hidden 128 --layers 2 --topologies 2x1 1x2"
    rows = tables_of(tmp_path, benchmarks.sharded, flags)["sharded"]
    places = [("TP2 x DP1", "tp 0 dp 0"), ("TP2 x DP1", "tp 1 dp 0")]
    places += [("TP1 x DP2", "tp 0 dp 0"), ("TP1 x DP2", "tp 0 dp 1")]
    assert [(row["topology"], row["rank"]) for row in rows] == places
    for half in (rows[:2], rows[2:]):
        assert sum(row["elements_M"] for row in half) == pytest.approx(2 * NUMEL / 1e6)
        assert all(row["orthonormalize_GFLOP"] > 0 for row in half)
    # Data-parallel ranks with whole layers tell each other norms of R and B, no factors.
    config = benchmarks.sharded.DionConfig(rank_fraction=1 / 4)
    matrices = [m for w in gpt(128, 2).weights(range(2)) for m in w.matrices(config)]
    norms = 2 * sum(8 * (matrix.rank + 1) for matrix in matrices)
    assert [row["sent_MB"] for row in rows[2:]] == 2 * [pytest.approx(norms / 2 / 1e6)]
    assert all(row["sent_MB"] > norms / 1e6 for row in rows[:2])


def test_memory(tmp_path: Path) -> None:
    flags = "--hidden 128 --layers 1 --topologies 1x1 2x1 --fractions 1/4 1"
    one, one_full, two, _ = tables_of(tmp_path, benchmarks.memory, flags)["memory"]
    rows = sum(w.rows for w in gpt(128, 1).weights([0]))
    assert one["weights_MB"] == pytest.approx(4e-6 * NUMEL)
    assert one["state_MB"] == pytest.approx(4e-6 * (NUMEL + 32 * rows))  # 32 is hidden / 4
    assert one_full["state_MB"] == pytest.approx(4e-6 * (NUMEL + 128 * rows))
    assert one["state_to_adamw"] == pytest.approx(one["state_MB"] / (2 * one["weights_MB"]))
    assert two["state_MB"] == pytest.approx(one["state_MB"] / 2)
    assert two["peak_MB"] >= two["largest_MB"] > 0
    assert one["kept_MB"] == 0  # a step's buffers are freed
    assert two["kept_MB"] < two["buffers_MB"] / 10


@pytest.mark.slow
def test_traffic(tmp_path: Path) -> None:
    """Three optimizers train, and Dion sends what it plans."""
    tables = tables_of(tmp_path, benchmarks.traffic, "--cases TP2 --fraction 1/2")
    adamw, dion, muon = tables["bytes"]
    assert [row["optimizer"] for row in (adamw, dion, muon)] == ["AdamW", "Dion", "Muon"]
    # Beside the exchange a step has single numbers, such as whether gradients are finite.
    assert dion["step_kB"] == pytest.approx(dion["planned_kB"], abs=0.064)
    assert dion["planned_kB"] > 100
    assert adamw["step_kB"] < 0.064 < muon["step_kB"]
    of_dion = [call for call in tables["calls"] if call["optimizer"] == "Dion"]
    assert sum(call["kB_of_all_ranks"] for call in of_dion) == pytest.approx(dion["step_kB"])
