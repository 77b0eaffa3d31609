"""`megatron-dion plan`: what it prints, and what it says of mistakes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dion import DionConfig
from megatron_dion_tools.cli import call
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.plan.hardware import hardware
from megatron_dion_tools.plan.models import GptShape
from megatron_dion_tools.plan.prediction import predict, search
from megatron_dion_tools.plan.stage import Optimizer, Run
from megatron_dion_tools.plan.topology import Topology

TINY = GptShape(6, 512, 1024, 8, 4, vocab=1000, sequence=256)
H100 = hardware("h100")


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    call(["plan", *words])
    return capsys.readouterr().out


def test_a_file_of_flags_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "examples/quick_start.args", "--dp", "2")
    labels = ["adamw", "muon blockwise", "muon duplicated", "dion 1", "dion 0.25", "dion 0.0625"]
    memory, sent, overview = re.findall(r"^ .*adamw(?: .*)?$|^.*bucket.*$", said, re.MULTILINE)[:3]
    assert all(label in line for label in labels for line in (memory, sent))
    assert overview.split()[:4] == ["DP", "bucket", "optimizer", "memory"]
    assert [label for label in labels if f" {label} " in said] == labels
    assert "micro batches of 4 x 256 tokens" in said
    assert "Without --vocab-size" in said
    assert "Times are a model, not measured" in said


def test_json_of_two_bucket_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    words = "160M --dp 4 8 --optimizer adam dion:1/4 --bucket-size 0 1000000 --json"
    found = json.loads(planned(capsys, *words.split()))
    assert len(found) == 8
    sent = {
        (row["run"]["topology"]["dp"], row["run"]["bucket_size"]): collective["bytes"]
        for row in found
        for collective in row["collectives"]
        if collective["name"] == "dion"
    }
    assert 0 < sent[8, 0] < sent[8, 1_000_000] / 2  # small buckets cut every matrix over all ranks
    assert {row["run"]["optimizer"]["kind"] for row in found} == {"adamw", "dion"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("8B --tp 3", "--tp 3 does not divide the model's 32 attention heads: take 2 or 4"),
        ("8B --pp 5", "--pp 5 does not divide the model's 32 layers: take 4 or 8"),
        ("8B --dp 6 --instances 4", "--instances 4 does not divide --dp 6: take 3 or 6"),
        ("8B --instances 2", "--instances 2: .*leave muon out of --optimizer"),
        ("8B --global-batch-size 9", "--global-batch-size 9 .*take 16, or another --dp"),
        ("9B", "MODEL 9B: no file of flags, and no preset .*8B"),
        ("8B --hardware a100", "--hardware a100: no file, and none of h100"),
        ("8B --optimizer dion:x", "--optimizer: dion:x: .*dion:1/4"),
        ("8B --optimizer dion:2", r"--optimizer: dion:2: .*\(0, 1\]"),
        ("8B --optimizer dion:1/0", "--optimizer: dion:1/0: .*dion:1/4"),
        ("8B --optimizer sgd", "--optimizer: sgd: write adam, .*dion:FRACTION"),
        ("8B --search 8 --pp 2", "--pp: --search tries all sizes: leave it out"),
        ("8B --tp 0", "--tp: 0 is no whole number of 1 or more"),
        ("8B --memory -1", "--memory: "),
        ("8B --micro-batch-size x", "--micro-batch-size: x is no whole number"),
        ("8B --bucket-size -1", "--bucket-size: "),
        ("8B --dp 4 --optimizer dion --dion-exchange-sets 0", "--dion-exchange-sets"),
    ],
)
def test_mistakes_name_the_flag_and_the_value(words: str, expected: str) -> None:
    with pytest.raises(ToolError, match=expected):
        call(["plan", *words.split()])


@pytest.mark.parametrize("rates", ["half = [", "fast", "half = 'fast'", "half = 1", "speed = 1"])
def test_mistakes_in_a_file_of_rates_name_it(tmp_path: Path, rates: str) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(rates)
    with pytest.raises(ToolError, match=f"--hardware {file}: .*plan/machines.toml"):
        call(["plan", "8B", "--hardware", str(file)])


def test_a_file_of_rates(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    lines = (f"{k} = {v!r}" for k, v in vars(replace(H100, source="us", latency=1.0)).items())
    file.write_text("\n".join(lines))
    assert hardware(str(file)) == replace(H100, source="us", latency=1.0)


def test_fp32_weights_need_no_masters() -> None:
    run = Run(TINY, Topology(dp=2), Optimizer("adamw"), global_batch=8)
    half, full = (predict(replace(run, weight_bytes=size), H100) for size in (2, 4))
    assert full.memory["weights"] == 2 * half.memory["weights"]
    assert full.memory["masters"] == 0 < half.memory["masters"]
    assert full.seconds > half.seconds  # products in float32


def test_an_iteration_is_its_parts() -> None:
    """On two stages, each micro batch's slot, the slots of the pipeline, and the step."""
    run = Run(TINY, Topology(pp=2), Optimizer("adamw"), global_batch=4)
    found = predict(run, H100)
    slots, more = (
        (each.seconds - each.step_seconds)
        for each in (found, predict(replace(run, global_batch=9), H100))
    )
    assert more / slots == pytest.approx((9 + 1) / (4 + 1), rel=0.05)
    assert found.step_seconds == pytest.approx(sum(found.step.values()))


def test_a_search_finds_what_trying_all_finds() -> None:
    run = Run(replace(TINY, layers=4), Topology(), Optimizer("dion"), global_batch=16)
    found = search(run, 8, H100, limit=H100.memory)
    every = []
    for tp, pp in ((tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4)):
        if 8 % (tp * pp):
            continue
        for bucket in (None, 0):
            topology = Topology(tp, pp, 8 // (tp * pp))
            try:
                every.append(predict(replace(run, topology=topology, bucket_size=bucket), H100))
            except ValueError:  # three query groups cannot be divided
                continue
    assert [one.seconds for one in found] == sorted(one.seconds for one in every)
    limit = sorted(one.bytes_needed for one in found)[len(found) // 2]
    assert any(one.bytes_needed > limit for one in found)
    fitting = search(run, 8, H100, limit)
    assert fitting == [one for one in found if one.bytes_needed <= limit]


def test_a_hundred_thousand_ranks() -> None:
    shape = GptShape(126, 16384, 53248, 128, 8, vocab=128256, sequence=8192)
    topology = Topology(tp=8, pp=16, dp=800)
    run = Run(shape, topology, Optimizer("dion", DionConfig()), bucket_size=0, global_batch=800)
    found = predict(run, H100)
    assert found.memory["weights"] == 2 * (
        8  # of a stage in the middle: the last one has a layer less
        * sum(w.rows * w.columns for w in shape.weights([1], 8))
        + shape.other_elements(range(8, 16), 8)
    )
    assert 0 < found.memory["exchange"] < 4 * 2**30
