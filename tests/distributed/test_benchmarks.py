"""Every benchmark with the smallest sizes: what it wrote, never how long anything took."""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import benchmarks
import benchmarks.checkpoint
import benchmarks.diagnostics
import benchmarks.iteration
import benchmarks.memory
import benchmarks.overlap
import benchmarks.scaling
import benchmarks.sharded
import benchmarks.startup
import benchmarks.step
import benchmarks.traffic
from benchmarks._models import gpt
from tests.distributed.nursery import Nursery

Result = dict[str, Any]


@pytest.fixture
def run(nursery: Nursery, tmp_path: Path) -> Any:
    """Runs a program's main in the process that has imported Megatron; returns what it wrote."""

    def run(program: Any, flags: str) -> Result:
        output = tmp_path / "result.json"
        argv = [*shlex.split(flags), "--repeats", "1", "--device", "cpu", "--output", str(output)]
        nursery.call(program.main, argv)
        result: Result = json.loads(output.read_text())
        assert result["options"]["repeats"] == 1
        return result

    return run


def test_every_program_is_described() -> None:
    folder = Path(benchmarks.__file__).parent
    described = (folder / "README.md").read_text()
    programs = [path.name for path in folder.glob("[!_]*.py")]
    assert len(programs) >= 7
    assert [name for name in programs if f"`{name}`" not in described] == []


def test_step(run: Any) -> None:
    result = run(benchmarks.step, "--matrices 2x24 3x16 --hidden 64 --fractions 1/4 1/16")
    floor, weights = result["tables"]["floor"], result["tables"]["weights"]
    assert [(row["matrices"], row["fraction"], row["rank"]) for row in floor] == [
        ("2 x 24", "1/4", 6),
        ("2 x 24", "1/16", 2),
        ("3 x 16", "1/4", 4),
        ("3 x 16", "1/16", 1),
    ]
    assert all(row["step_to_fewest"] > row["step_to_floor"] > 0 for row in floor)
    assert Counter(row["weights"] for row in weights) == {"fp32": 8, "bf16": 8}
    names = [row["optimizer"] for row in weights[:8]]
    assert names[2:4] == ["Muon, Megatron", "Muon, Newton-Schulz in fp32"]
    assert names[4:6] == ["Dion 1/16", "Dion 1/4"]
    assert names[6:] == ["Dion 1/16, products in bf16", "Dion 1/4, products in bf16"]
    assert all(row["to_muon"] == 1 for row in weights if row["optimizer"] == "Muon, Megatron")
    # Each kind of matrices; two ranks, two dtypes, three pairs of precisions.
    assert len(result["goals"]) == 2 + 2 * 2 * 3


def test_sharded(run: Any) -> None:
    rows = run(benchmarks.sharded, "--hidden 128 --topologies 2x1 1x2")["tables"]["sharded"]
    assert [(row["topology"], row["rank"]) for row in rows] == [
        ("TP2 x DP1", "tp 0 dp 0"),
        ("TP2 x DP1", "tp 1 dp 0"),
        ("TP1 x DP2", "tp 0 dp 0"),
        ("TP1 x DP2", "tp 0 dp 1"),
    ]
    numel = sum(w.rows * w.columns for w in gpt(128, 2).weights(range(2)))
    for half in (rows[:2], rows[2:]):
        assert sum(row["held_M"] for row in half) == pytest.approx(numel / 1e6)
        assert sum(row["charges"] for row in half) >= 14  # 7 matrices a layer
    assert all(row["sent_MB"] > 0 for row in rows[:2])
    assert all(row["sent_MB"] == 0 for row in rows[2:])  # whole layers on each rank


def test_scaling(run: Any) -> None:
    rows = run(benchmarks.scaling, "--hidden 128 --ranks 1 2")["tables"]["scaling"]
    assert [(row["ranks"], row["parallel"]) for row in rows] == [
        (1, "data"),
        (1, "tensor"),
        (2, "data"),
        (2, "tensor"),
    ]
    assert all(row["busiest_ms"] >= row["mean_ms"] > 0 for row in rows)


def test_memory(run: Any) -> None:
    flags = "--hidden 128 --layers 1 --topologies 1x1 2x1 --fractions 1/4 1"
    one, one_full, two, _ = run(benchmarks.memory, flags)["tables"]["memory"]
    weights = gpt(128, 1).weights(range(1))
    numel = sum(w.rows * w.columns for w in weights)
    rows = sum(w.rows for w in weights)
    assert one["weights_MB"] == pytest.approx(4e-6 * numel)
    assert one["adamw_state_MB"] == pytest.approx(8e-6 * numel)
    assert one["state_MB"] == pytest.approx(4e-6 * (numel + 32 * rows))  # hidden / 4
    assert one_full["state_MB"] == pytest.approx(4e-6 * (numel + 128 * rows))
    assert one["smallest_sharded_MB"] is None
    assert two["smallest_sharded_MB"] == pytest.approx(4e-6 * 128 * 128)
    assert two["state_MB"] == pytest.approx(one["state_MB"] / 2)
    assert two["peak_MB"] >= two["largest_MB"] > 0


def test_traffic(run: Any) -> None:
    """Three methods train: what Dion sends is what it plans, close to the least."""
    result = run(benchmarks.traffic, "--cases DP2 --fraction 1/2")
    [row] = result["tables"]["bytes"]
    assert row["case"] == "DP2"
    # Beside the exchange a step has single numbers: whether gradients are finite.
    assert row["dion_extra_kB"] == pytest.approx(row["planned_kB"], abs=0.064)
    assert 1 <= row["extra_to_bound"] <= benchmarks.traffic.LIMIT
    assert row["muon_extra_kB"] > row["adamw_kB"] / 4
    kinds = result["tables"]["kinds"]
    assert sum(kind["planned_kB"] for kind in kinds) == pytest.approx(row["planned_kB"])
    assert {call["method"] for call in result["tables"]["calls"]} == {"adam", "dion", "muon"}
    assert [goal["is_met"] for goal in result["goals"]] == [True]


def test_traffic_of_large_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These are planned: with one bucket fewer matrices are cut."""
    monkeypatch.setattr(benchmarks.traffic, "LARGE", (("8B", 1, 4, (16,)),))
    output = tmp_path / "result.json"
    benchmarks.traffic.main(["--large", "--device", "cpu", "--output", str(output)])
    result = json.loads(output.read_text())
    one, cut = result["tables"]["planned"]
    assert [goal["is_met"] for goal in result["goals"]] == [True, True]
    assert (one["buckets"], one["grid"]) == (1, "TP1 x DP16")
    assert cut["buckets"] > 1
    assert one["adamw_MB"] == cut["adamw_MB"]
    assert 0 < one["data_MB"] < cut["data_MB"]
    for row in (one, cut):
        assert 1 <= row["data_MB"] / row["bound_data_MB"] <= benchmarks.traffic.LIMIT
        assert row["undivided_data_MB"] == pytest.approx(row["bound_data_MB"])


def test_overlap(run: Any) -> None:
    result = run(benchmarks.overlap, "--hidden 128 --layers 2 --sets 1 2 --latency 0.01")
    rows = result["tables"]["overlap"]
    simulated = "simulated: 0.01 ms, 0.25 GB/s"
    assert [(row["link"], row["sets"]) for row in rows] == [
        ("gloo", 1),
        (simulated, 1),
        ("gloo", 2),
        (simulated, 2),
    ]
    for row in rows:
        assert 0 < row["exposed_ms"] < row["step_ms"]
        assert row["sets"] == 2 or row["to_one"] == 1
    assert len(result["goals"]) == 2  # two sets, over each link


def test_diagnostics(run: Any) -> None:
    flags = "--hidden 128 --topologies 1x1 2x1 --fractions 1/4 1"
    rows = run(benchmarks.diagnostics, flags)["tables"]["diagnostics"]
    assert [(row["topology"], row["fraction"]) for row in rows] == [
        ("TP1 x DP1", "1/4"),
        ("TP1 x DP1", "1"),
        ("TP2 x DP1", "1/4"),
        ("TP2 x DP1", "1"),
    ]
    assert all(row["measured_to_step"] > 0 for row in rows)


def test_startup(run: Any) -> None:
    command = "doctor --help"
    flags = (
        f"--imports torch --model 8B --grids 1x2 2x2 --hidden 64 --layers 1 --commands {command!r}"
    )
    tables = run(benchmarks.startup, flags)["tables"]
    assert [row["code"] for row in tables["import"]] == ["torch"]
    assert [row["grid"] for row in tables["plan"]] == ["8B on TP1 x DP2", "8B on TP2 x DP2"]
    assert [row["megatron-dion"] for row in tables["command"]] == [command]
    assert [row["step"] for row in tables["first step"]] == ["first", "second", "third"]


TINY = "--hidden 64 --layers 1 --sequence 16 --batch 2"


def test_iteration(run: Any) -> None:
    flags = f"{TINY} --hidden 128 --iterations 1 --muon-fp32-matmul-prec high"
    flags += " --optimizers Muon 'Muon duplicated' AdamW"
    rows = run(benchmarks.iteration, f"{flags} --topologies 1x1 2x1 --dtypes bf16")["tables"][
        "iteration"
    ]
    assert [(row["topology"], row["optimizer"]) for row in rows] == [
        ("TP1 x DP1", "Muon"),
        ("TP1 x DP1", "AdamW"),
        ("TP2 x DP1", "Muon"),
        ("TP2 x DP1", "Muon duplicated"),
        ("TP2 x DP1", "AdamW"),
    ]
    for row in rows:
        assert row["dtype"] == "bf16"
        assert row["iterations"] == 1  # without those that warm up
        assert row["tokens"] == 32
        assert 0 < row["share_percent"] < 100
        assert (row["to_adamw"] == 1) == (row["optimizer"] == "AdamW")


def test_iteration_of_data_parallel_ranks(run: Any) -> None:
    """The batch is divided; without AdamW there is nothing to compare with."""
    flags = f"{TINY} --iterations 1 --topologies 1x2 --dtypes fp32 --optimizers Muon 'Dion 1/16'"
    rows = run(benchmarks.iteration, flags)["tables"]["iteration"]
    assert [(row["optimizer"], row["dtype"]) for row in rows] == [
        ("Muon", "fp32"),
        ("Dion 1/16", "fp32"),
    ]
    assert all(row["to_adamw"] is None for row in rows)


def test_checkpoint(run: Any) -> None:
    asynchronous = "Dion 1/4, asynchronous"
    rows = run(benchmarks.checkpoint, f"{TINY} --saves 1 --cases AdamW {asynchronous!r}")["tables"][
        "checkpoint"
    ]
    assert [row["saves"] for row in rows] == [1, 1]
    for row in rows:
        kept = 16 if "AdamW" in row["checkpoint"] else 12  # weights, masters, moments or momentum
        assert row["bytes_per_parameter"] > kept
        assert row["save_ms"] > 0
        assert row["load_ms"] > 0
