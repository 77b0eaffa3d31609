"""Training on CPU with the unmodified megatron-core: what stands in for torch.cuda."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_dion.platforms import cpu, resolve_device
from tests.distributed.tiny_gpt import MODEL, TP2, TRAINING, losses, records_of
from tests.worlds import world


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto") == device
    assert resolve_device("cuda") == "cuda"


_INSTALLING = """
import warnings, torch
from megatron_dion.platforms import cpu
torch.cuda.is_available = lambda: True
try:
    cpu.install()
except RuntimeError as error:
    print(error)
cpu.install(hide_gpus=True)
zeros = torch.zeros
cpu.install()
print(torch.cuda.is_available(), torch.zeros is zeros)
with warnings.catch_warnings(record=True) as caught:
    warnings.warn("Apex is not installed. Falling back to Torch Norm")
    warnings.warn("the loss is odd")
print([str(warning.message) for warning in caught])
"""


def test_installing() -> None:
    """In a process of its own, since it changes torch for good."""
    command = [sys.executable, "-c", _INSTALLING]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    gpu, state, warned = result.stdout.splitlines()
    assert "--device cpu" in gpu
    assert state == "False True"  # the GPU is hidden; a second call changes nothing
    assert warned == "['the loss is odd']"


def test_what_does_not_exist_is_not_replaced() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.no_such_function that could be replaced"):
        cpu._replace(torch.cuda, no_such_function=None)


def gather_unequal_shards() -> list[list[float]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.full((rank, 2), float(rank))
    shards = [torch.empty(other, 2) for other in range(size)]
    dist.all_gather(shards, mine)
    return [shard.flatten().tolist() for shard in shards]


def test_all_gather_takes_unequal_shards() -> None:
    expected = [[float(rank)] * (2 * rank) for rank in range(4)]
    assert world(4).run(gather_unequal_shards) == [expected] * 4


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled: bool) -> None:
    from megatron_dion.platforms.cpu_adam import CpuAdam

    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    mine = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    theirs = torch.nn.Parameter(mine.detach().clone())
    reference_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = reference_class([theirs], **options)  # type: ignore[arg-type]
    optimizer = CpuAdam([mine], adam_w_mode=decoupled, **options)  # type: ignore[arg-type]
    for step in range(4):
        mine.grad = torch.sin(torch.arange(7.0) + step)
        theirs.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert optimizer.param_groups[0]["step"] == 4
    assert set(optimizer.state[mine]) == {"exp_avg", "exp_avg_sq"}


ADAM = [*MODEL, *TRAINING, "--optimizer", "adam", "--train-iters", "4"]


def test_stock_adam_leaves_a_run_directory(tmp_path: Path) -> None:
    evaluation = ["--eval-iters", "1", "--eval-interval", "2", "--split", "80,10,10"]
    world(1).train(*ADAM, *evaluation, "--run-dir", str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "starts.jsonl"}
    training = records_of(tmp_path)
    assert [record["iteration"] for record in training] == [1, 2, 3, 4]
    assert [record["tokens"] for record in training] == [12 * 32 * i for i in (1, 2, 3, 4)]
    assert all(record["iteration_seconds"] > record["optimizer_seconds"] > 0 for record in training)
    assert [record["iteration"] for record in records_of(tmp_path, "validation")] == [2, 4]
    assert len(records_of(tmp_path, "test")) == 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["arguments"]["distributed_backend"] == "gloo"
    assert config["defaults"]["hidden_dropout"] == 0.1
    [start] = map(json.loads, (tmp_path / "starts.jsonl").read_text().splitlines())
    assert (start["iteration"], start["world_size"]) == (0, 1)


@pytest.mark.slow
def test_recomputing_repeats_the_same_dropout(tmp_path: Path) -> None:
    dropout = "--attention-dropout 0.2 --hidden-dropout 0.2"
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    for name, options in (("stored", ""), ("recomputed", recompute)):
        flags = f"{dropout} {TP2} {options} --run-dir {tmp_path / name}"
        world(2).train(*ADAM, *flags.split())
    assert losses(tmp_path / "stored") == losses(tmp_path / "recomputed")


def test_stock_adam_resumes_where_it_stopped_with_dropout(tmp_path: Path) -> None:
    checkpoint, run_dir = str(tmp_path / "checkpoint"), tmp_path / "run"
    options = [*ADAM, "--use-distributed-optimizer", "--run-dir", str(run_dir)]
    options += ["--dist-ckpt-optim-fully-reshardable", "--hidden-dropout", "0.2"]
    world(2).train(*options, "--save", checkpoint, "--save-interval", "2")
    uninterrupted = losses(run_dir)
    world(2).train(*options, "--load", checkpoint, "--ckpt-step", "2")
    assert losses(run_dir) == uninterrupted


@pytest.mark.parametrize(
    "options",
    ["--bf16 --use-distributed-optimizer", pytest.param("", marks=pytest.mark.slow)],
)
def test_stock_muon_trains(options: str, tmp_path: Path) -> None:
    world(2).train(*ADAM, "--optimizer", "muon", *options.split(), "--run-dir", str(tmp_path))
    first, *_, last = losses(tmp_path)
    assert last < first
