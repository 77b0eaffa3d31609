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
from benchmarks._models import gpt
from tests.worlds import in_host

NUMEL = sum(w.rows * w.columns for w in gpt(128, 1).weights([0]))


def tables_of(folder: Path, program: ModuleType, flags: str) -> dict[str, Any]:
    """What a program's `main` writes, in the process that can fork ranks of Megatron."""
    output = folder / "result.json"
    argv = [*shlex.split(flags), "--repeats", "1", "--device", "cpu", "--output", str(output)]
    in_host(program.main, argv)
    tables: dict[str, Any] = json.loads(output.read_text())["tables"]
    return tables


def test_every_program_is_described() -> None:
    folder = Path(benchmarks.step.__file__).parent
    programs = [path.name for path in folder.glob("[!_]*.py")]
    described = (folder / "README.md").read_text()
    assert programs
    assert [name for name in programs if f"`{name}`" not in described] == []


def test_step(tmp_path: Path) -> None:
    flags = "--matrices 2x24 3x16 --hidden 64 --fractions 1/4 1/16"
    tables = tables_of(tmp_path, benchmarks.step, flags)
    floor, weights = tables["floor"], tables["weights"]
    assert [(row["matrices"], row["fraction"], row["rank"]) for row in floor] == [
        ("2 x 24", "1/4", 6),
        ("2 x 24", "1/16", 2),
        ("3 x 16", "1/4", 4),
        ("3 x 16", "1/16", 1),
    ]
    assert all(
        row["step_to_floor"]
        == pytest.approx(row["step_ms"] / (row["products_ms"] + row["orthonormalize_ms"]))
        for row in floor
    )
    assert [row["optimizer"] for row in weights] == [
        *("AdamW", "Muon", "Muon, fp32 products"),
        *("Dion 1/16", "Dion 1/16, bf16 products", "Dion 1/4", "Dion 1/4, bf16 products"),
    ]
    assert [row["optimizer"] for row in weights if row["to_muon"] == 1] == ["Muon"]


def test_sharded(tmp_path: Path) -> None:
    flags = "--hidden 128 --layers 2 --topologies 2x1 1x2"
    rows = tables_of(tmp_path, benchmarks.sharded, flags)["sharded"]
    assert [(row["topology"], row["rank"]) for row in rows] == [
        ("TP2 x DP1", "tp 0 dp 0"),
        ("TP2 x DP1", "tp 1 dp 0"),
        ("TP1 x DP2", "tp 0 dp 0"),
        ("TP1 x DP2", "tp 0 dp 1"),
    ]
    for half in (rows[:2], rows[2:]):
        assert sum(row["elements_M"] for row in half) == pytest.approx(2 * NUMEL / 1e6)
        assert all(row["orthonormalize_GFLOP"] > 0 for row in half)
    # Data-parallel ranks with whole layers tell each other the column norms of R, no factors.
    norms = 2 * sum(8 * matrix.rank for matrix in matrices_of_two_layers())
    assert [row["sent_MB"] for row in rows[2:]] == 2 * [pytest.approx(norms / 2 / 1e6)]
    assert all(row["sent_MB"] > norms / 1e6 for row in rows[:2])


def matrices_of_two_layers() -> list[Any]:
    config = benchmarks.sharded.DionConfig(rank_fraction=1 / 4)
    return [m for w in gpt(128, 2).weights(range(2)) for m in w.matrices(config)]


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
