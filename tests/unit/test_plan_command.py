"""`megatron-dion plan`: what it prints, and what it says of mistakes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest

from megatron_dion import DionConfig
from megatron_dion_tools.cli import call
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.flags import read_flags
from megatron_dion_tools.plan.flags import shape_from_flags
from megatron_dion_tools.plan.hardware import hardware
from megatron_dion_tools.plan.models import PRESETS, Experts, GptShape
from megatron_dion_tools.plan.pictures import plot
from megatron_dion_tools.plan.prediction import predict
from megatron_dion_tools.plan.search import search
from megatron_dion_tools.plan.stage import Optimizer, Run
from megatron_dion_tools.plan.topology import Batch, Topology

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
    ("shape", "dps", "units"),
    [
        (TINY, (2,), ("MiB", "MB", "us")),
        (TINY, (2, 4), ("MiB", "kB", "us")),
        (PRESETS["8B"], (2,), ("GiB", "GB", "ms")),
    ],
)
def test_picture_has_units_that_fit(
    tmp_path: Path, shape: GptShape, dps: tuple[int, ...], units: tuple[str, ...]
) -> None:
    found = {
        dp: [
            predict(Run(shape, Topology(dp=dp), optimizer), Batch(1, 8), H100)
            for optimizer in (Optimizer("adamw"), Optimizer("dion", DionConfig(rank_fraction=0.25)))
        ]
        for dp in dps
    }
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot(found, tmp_path / "plan.svg", "title")
    text = (tmp_path / "plan.svg").read_text()
    assert all(re.search(rf", {unit}( \(a model\))?<", text) for unit in units)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["8B", "--tp", "3"], ["--tp 3", "32 attention heads", "take 1, 2, 4 or 8"]),
        (["8B", "--pp", "5"], ["--pp 5", "32 layers", "take 4 or 8"]),
        (["8B", "--dp", "6", "--instances", "4"], ["--instances 4", "--dp 6", "take 3 or 6"]),
        (["8B", "--ep", "2"], ["--ep 2", "no experts", "take 1"]),
        (["16B-MoE", "--dp", "12", "--ep", "8"], ["--ep 8", "--dp 12", "take 6 or 12"]),
        (["16B-MoE", "--dp", "12", "--ep", "12"], ["--ep 12", "64 experts", "take 8 or 16"]),
        (["8B", "--instances", "2"], ["--instances 2", "muon out of --optimizer"]),
        (["8B", "--dp", "8", "--global-batch-size", "9"], ["--global-batch-size 9", "take 16"]),
        (["9B"], ["MODEL 9B", "8B"]),
        (["8B", "--hardware", "a100"], ["--hardware a100", "h100"]),
        (["8B", "--optimizer", "dion:x"], ["--optimizer dion:x", "dion:1/4"]),
        (["8B", "--optimizer", "dion:2"], ["--optimizer dion:2", "(0, 1]", "dion:FRACTION"]),
        (["8B", "--optimizer", "dion:1/0"], ["--optimizer dion:1/0", "(0, 1]"]),
        (["8B", "--optimizer", "sgd"], ["--optimizer sgd", "adam", "dion:FRACTION"]),
        (["8B", "--search", "8", "--json"], ["--json", "--search", "leave it out"]),
    ],
)
def test_mistakes_name_the_flag_and_the_value(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ToolError) as error:
        call(["plan", *arguments])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-layers two", ["--num-layers", "two is no whole number"]),
        ("--num-layers", ["--num-layers", "expected one argument"]),
        ("--hidden-size 8", ["--num-layers, --num-attention-heads"]),
        ("--num-layers 'two", ["quotation"]),
        ("--micro-batch-size 0", ["--micro-batch-size", "0 is no whole number of 1 or more"]),
        (
            "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --num-experts 2"
            " --moe-layer-freq every",
            ["--moe-layer-freq every", "([0]*1+[1]*27)"],
        ),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path: Path, flags: str, words: list[str]) -> None:
    file = tmp_path / "model.args"
    file.write_text(flags)
    with pytest.raises(ToolError) as error:
        call(["plan", str(file)])
    assert all(word in str(error.value) for word in (f"MODEL {file}", *words)), error.value


@pytest.mark.parametrize("rates", ["half: [", "fast", "half: fast", "half: 1"])
def test_mistakes_in_a_file_of_rates_name_it(tmp_path: Path, rates: str) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(rates)
    with pytest.raises(ToolError, match=f"--hardware {file}: "):
        call(["plan", "8B", "--hardware", str(file)])


@pytest.mark.parametrize(
    "words", ["--tp 0", "--memory -1", "--micro-batch-size x", "--bucket-size -1"]
)
def test_sizes_are_positive(words: str) -> None:
    with pytest.raises(ToolError, match=f"argument {words.split()[0]}: "):
        call(["plan", "8B", *words.split()])


def test_a_mistake_is_one_line_with_exit_code_2() -> None:
    done = plan("8B", "--optimizer", "dion:2")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: --optimizer dion:2: ")


FLAGS = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 4 --vocab-size 16"


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    call(["plan", *arguments, "--optimizer", "adam"])
    return capsys.readouterr().out


def test_batch_and_type_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.args"
    file.write_text(f"{FLAGS} --micro-batch-size 3 --global-batch-size 12 --fp16")
    said = planned(capsys, str(file))
    assert "DP4, 1 micro batch of 3 x 4 tokens" in said  # at 8 the batch could not be divided
    taken = "--micro-batch-size 3, --global-batch-size 12, --dtype fp16."
    assert f"From {file}: {taken}" in said
    said = planned(capsys, str(file), "--dp", "2", "--micro-batch-size", "1", "--dtype", "bf16")
    assert "DP2, 6 micro batches of 1 x 4 tokens" in said
    assert f"From {file}: --global-batch-size 12." in said


def test_weights_of_a_file_are_fp32_unless_it_says_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for flag in ("", "--bf16", "--fp16"):
        file = tmp_path / "model.args"
        file.write_text(f"{FLAGS} {flag}")
        [rank] = json.loads(planned(capsys, str(file), "--json"))
        found[flag] = rank["memory"]["weights"]["busiest"]
        slower = rank["iteration_seconds"]
        found[f"seconds {flag}"] = slower
    assert found[""] == 2 * found["--bf16"] == 2 * found["--fp16"]
    assert found["seconds "] > found["seconds --bf16"]  # products in float32


def test_a_file_without_a_vocabulary_says_what_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = planned(capsys, "examples/quick_start.args")
    assert "no --vocab-size: the embedding and the output layer are left out" in said


def test_units_fit_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.args"
    file.write_text(FLAGS)
    small, large = planned(capsys, str(file)), planned(capsys, "8B")
    for words in ("1.89 K parameters", "with most, KiB", "sends most, kB", "step us"):
        assert words in small
    for words in ("8.03 B parameters", "with most, GiB", "sends most, GB", "step ms"):
        assert words in large
    assert "masters" not in small  # the weights are fp32: none has any
    assert "masters" in large


def test_every_option_tells_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(["plan", "--help"])
    options = capsys.readouterr().out.partition("\nranks:")[2].split("\n  --")[1:]
    assert len(options) > 15
    silent = [
        option for option in options if not option.partition("\n\n")[0].rstrip().endswith(")")
    ]
    assert not silent


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


def test_a_hundred_thousand_ranks() -> None:
    """Every one of them is planned: what they hold is the model, once."""
    shape = PRESETS["405B"]
    topology = Topology(tp=8, pp=16, dp=800, account_for_ends=shape.needs_ends(16))
    run = Run(shape, topology, Optimizer("dion"), bucket_size=0)
    found = predict(run, Batch(1, 64 * 800), H100)
    matrices = sum(w.rows * w.columns for w in shape.weights(range(shape.layers)))
    assert found.memory["masters"].mean * 8 * 16 * 800 == pytest.approx(4 * matrices)
    left = found.collectives["dion data left"].sent
    assert 0 < left.mean < left.busiest


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
    def fitting(limit: float) -> list[float]:
        batch, optimizer = Batch(1, 16), Optimizer("adamw")
        return [found.bytes_needed for found in search(TINY, 8, batch, optimizer, H100, limit).best]

    limit = min(fitting(H100.memory))  # of the fastest
    assert limit < max(fitting(H100.memory))
    assert max(fitting(limit)) == limit


def test_more_ranks_per_matrix_and_no_memory_for_more() -> None:
    machine = replace(H100, memory=1.0)
    assert search(TINY, 8, Batch(1, 16), Optimizer("dion"), machine, machine.memory).best == []
