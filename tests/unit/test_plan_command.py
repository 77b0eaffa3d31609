"""`megatron-dion plan`: what it prints, and what it says of mistakes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dion.cli import call
from megatron_dion.commands.errors import ToolError
from megatron_dion.local.flags import read_flags
from megatron_dion.planning.flags import shape_from_flags
from megatron_dion.planning.hardware import hardware
from megatron_dion.planning.models import Experts, GptShape
from megatron_dion.planning.prediction import predict
from megatron_dion.planning.search import search
from megatron_dion.planning.stage import Optimizer, Run
from megatron_dion.planning.topology import Batch, Topology

TINY = GptShape(6, 512, 1024, 8, 4, vocab=1000, sequence=256)
H100 = hardware("h100")


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_dion", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_file_of_flags_side_by_side() -> None:
    done = plan("examples/quick_start.args", "--dp", "2", "--optimizer", "adamw", "dion:1/4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("adamw", "dion 0.25"))] == [
        *("adamw", "dion"),
        *("adamw", "dion"),
    ]
    assert "Times are a model, not measured" in done.stdout


def test_json_of_two_bucket_sizes_and_a_plot(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = plan(
        *("160M", "--dp", "8", "--optimizer", "dion:1/4", "--bucket-size", "0", "1000000"),
        *("--json", "--plot", str(picture)),
    )
    assert done.returncode == 0, done.stderr
    one, cut = json.loads(done.stdout)
    sent = [found["collectives"]["dion data left"]["sent"]["mean"] for found in (one, cut)]
    assert 0 < sent[0] < sent[1] / 2  # small buckets cut every matrix over all ranks
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["8B", "--tp", "3"], ["heads 32", "tensor_parallel_size 3"]),
        (["8B", "--pp", "5"], ["layers 32", "pipeline_parallel_size 5"]),
        (["8B", "--dp", "6", "--instances", "4"], ["--instances 4", "--dp 6"]),
        (["8B", "--ep", "2"], ["--ep 2", "0 experts"]),
        (["8B", "--global-batch-size", "9"], ["--global-batch-size 9", "take 16"]),
        (["9B"], ["MODEL 9B", "8B"]),
        (["8B", "--hardware", "a100"], ["--hardware a100", "h100"]),
        (["8B", "--optimizer", "dion:x"], ["--optimizer dion:x", "dion:1/4"]),
    ],
)
def test_mistakes_name_the_flag_and_the_value(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ToolError) as error:
        call(["plan", *arguments])
    assert all(word in str(error.value) for word in words)


def test_shapes_of_flags() -> None:
    found = shape_from_flags(read_flags(Path("examples/quick_start.args")))
    expected = GptShape(4, 128, 344, 4, 2, vocab=None, sequence=256)
    assert found == expected
    flags = "--num-layers 28 --hidden-size 2048 --num-attention-heads 16 --vocab-size 100"
    flags += " --num-experts 64 --moe-router-topk 6 --moe-ffn-hidden-size 1408"
    flags += " --moe-layer-freq ([0]*1+[1]*27)"
    moe = shape_from_flags(flags.split())
    assert moe.experts == Experts(64, 6, 1408, dense_layers=1)
    assert (moe.ffn, moe.gated, moe.tied, moe.biases) == (8192, False, True, True)
    with pytest.raises(ValueError, match="need --num-layers"):
        shape_from_flags(["--hidden-size", "8", "--num-attention-heads", "1"])


def test_a_search_finds_what_trying_all_finds() -> None:
    optimizer, batch = Optimizer("dion"), Batch(1, 16)
    found = search(TINY, 8, batch, optimizer, H100, limit=H100.memory, most=3)
    every = []
    for tp, pp in ((tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 3, 4, 6)):
        if 8 % (tp * pp):
            continue
        topology = Topology(tp, pp, 8 // (tp * pp), account_for_ends=TINY.needs_ends(pp))
        for bucket in (None, 0):
            try:
                every.append(predict(Run(TINY, topology, optimizer, bucket), batch, H100).seconds)
            except ValueError:
                continue
    assert [one.seconds for one in found.best] == sorted(every)[:3]


def test_a_search_keeps_to_the_memory() -> None:
    limits = (H100.memory, 60e6)
    big, small = (search(TINY, 8, Batch(1, 16), Optimizer("adamw"), H100, m) for m in limits)
    assert all(found.bytes_needed <= 60e6 for found in small.best)
    assert len(small.best) < len(big.best) or any("GiB" in reason for reason in small.failures)


def test_more_ranks_per_matrix_and_no_memory_for_more() -> None:
    machine = replace(H100, memory=1.0)
    assert search(TINY, 8, Batch(1, 16), Optimizer("dion"), machine, machine.memory).best == []
