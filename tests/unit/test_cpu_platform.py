import argparse
import contextlib
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_dion.megatron.errors import ConfigurationError
from megatron_dion.megatron.flags import CPU_DEFAULTS, extra_args_provider
from megatron_dion.megatron.progress import describe_processes
from megatron_dion.platforms import cpu, requested_device, resolve_device
from megatron_dion_tools.local.world import run_world
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery
from tests.project import ROOT

# Everything that installs the platform runs in forked processes: it changes torch for good.


@pytest.mark.parametrize(
    ("argv", "device"),
    [
        ([], "auto"),
        (["--lr", "1", "--device", "cpu", "--bf16"], "cpu"),
        (["--device=cuda"], "cuda"),
        (["--device-other", "cuda"], "auto"),
    ],
)
def test_device_is_read_before_everything_else(argv: list[str], device: str) -> None:
    assert requested_device(argv) == device


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto") == device
    assert resolve_device("cuda") == "cuda"


def install_beside_a_gpu() -> tuple[str, bool]:
    torch.cuda.is_available = lambda: True
    refusal = ""
    try:
        cpu.install()
    except RuntimeError as error:
        refusal = str(error)
    cpu.install(hide_gpus=True)
    return refusal, torch.cuda.is_available()


def test_installing_beside_a_gpu_has_to_be_asked_for() -> None:
    [(refusal, available)] = run_world(1, install_beside_a_gpu)
    assert "--device cpu" in refusal
    assert not available


def install_twice() -> bool:
    cpu.install()
    zeros = torch.zeros
    cpu.install()
    return torch.zeros is zeros


def test_installing_twice_is_installing_once() -> None:
    assert run_world(1, install_twice) == [True]


def test_refusal_is_all_there_is_to_read() -> None:
    """As a user starts it: the nursery has long heard what importing Megatron has to say."""
    script = str(ROOT / "pretrain_gpt.py")
    command = [sys.executable, script, "--device", "cpu", *DION, "--dion-rank-fraction", "2"]
    refused = subprocess.run([*command, *MODEL, *TRAINING], capture_output=True, text=True)
    assert refused.stdout == ""
    assert refused.stderr == "error: --dion-rank-fraction must be in (0, 1], not 2.0\n"
    assert refused.returncode == 2


def warnings_left() -> list[str]:
    warnings.resetwarnings()  # pytest has filters of its own
    cpu.install()
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("the loss is odd", stacklevel=1)
    return [str(warning.message) for warning in caught]


def test_warnings_about_the_run_are_not_hidden() -> None:
    assert run_world(1, warnings_left) == [["the loss is odd"]]


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ((1, 1, 1, 1, 1, 1), "1 process on CPU (no GPU is used)"),
        ((4, 2, 1, 1, 1, 2), "4 processes on CPU (no GPU is used): TP2 x DP2"),
        ((8, 1, 2, 2, 1, 2), "8 processes on CPU (no GPU is used): PP2 x CP2 x DP2"),
        ((4, 1, 1, 1, 2, 4), "4 processes on CPU (no GPU is used): DP4, experts over 2"),
    ],
)
def test_processes_are_described(sizes: tuple[int, ...], line: str) -> None:
    names = ("tensor_model", "pipeline_model", "context", "expert_model", "data")
    parallel = dict(zip([f"{name}_parallel_size" for name in names], sizes[1:], strict=True))
    args = argparse.Namespace(device="cpu", world_size=sizes[0], **parallel)
    assert describe_processes(args) == line


def install_megatron_patches_first() -> str:
    try:
        cpu.install_megatron_patches()
    except RuntimeError as error:
        return str(error)
    return ""


def test_order_of_installing_is_checked() -> None:
    [message] = run_world(1, install_megatron_patches_first)
    assert "before megatron is imported" in message


def test_patches_of_things_that_do_not_exist_fail() -> None:
    with pytest.raises(RuntimeError, match="does not have"):
        cpu.Patch(torch.cuda, "no_such_function", None, "").apply()


def every_patch_has_a_reason() -> bool:
    patches = [*cpu._torch_patches(), *cpu._megatron_patches()]
    return all(patch.reason for patch in patches)


def test_every_patch_has_a_reason(nursery: Nursery) -> None:
    assert nursery.run(1, every_patch_has_a_reason) == [True]


def tensors_and_types() -> list[str]:
    made = torch.zeros(2, device="cuda"), torch.tensor([1.0], device=torch.device("cuda:0")).cuda()
    types = made[0].type(), made[1].bfloat16().type(), made[0].type(torch.int32).dtype
    return [*(str(tensor.device) for tensor in made), *map(str, types)]


def test_cuda_tensors_are_made_on_cpu_and_say_so(nursery: Nursery) -> None:
    assert nursery.run(1, tensors_and_types) == [
        ["cpu", "cpu", "torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.int32"]
    ]


def random_streams() -> bool:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    again = torch.rand(3)
    torch.manual_seed(5)
    return torch.equal(first, again) and torch.equal(first, torch.rand(3))


def test_the_cuda_generator_is_the_default_one(nursery: Nursery) -> None:
    assert nursery.run(1, random_streams) == [True]


def gather_unequal_shards() -> list[list[float]]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.full((rank, 2), float(rank))
    shards = [torch.empty(other, 2) for other in range(size)]
    dist.all_gather(shards, mine)
    return [shard.flatten().tolist() for shard in shards]


def test_all_gather_takes_unequal_shards(nursery: Nursery) -> None:
    expected = [[float(rank)] * (2 * rank) for rank in range(3)]
    assert nursery.run(3, gather_unequal_shards) == [expected] * 3


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


def causal_masks(ranks: int, tokens: int) -> torch.Tensor:
    from megatron_dion.platforms.cpu_attention import causal_mask, token_positions

    keys = torch.cat([token_positions(tokens // ranks, rank, ranks) for rank in range(ranks)])
    masks = torch.cat([causal_mask(tokens // ranks, rank, ranks)[0, 0] for rank in range(ranks)])
    # Back into the order of the sequence, on both sides.
    order = keys.argsort()
    return masks[order][:, order]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_masks_of_all_ranks_make_the_causal_mask(ranks: int, nursery: Nursery) -> None:
    [mask] = nursery.run(1, causal_masks, ranks, 16)
    assert torch.equal(mask, torch.ones(16, 16).triu(1).bool())


def parse(device: str, *argv: str) -> argparse.Namespace:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return extra_args_provider(device)(parser).parse_args(argv)


def parsed_defaults(device: str, *argv: str) -> tuple[str, int]:
    # Not the whole namespace: it holds megatron's types, and this process has not imported it.
    args = parse(device, *argv)
    return args.distributed_backend, args.num_workers


def test_cpu_defaults_give_way_to_the_user(nursery: Nursery) -> None:
    gloo, workers = CPU_DEFAULTS["distributed_backend"], CPU_DEFAULTS["num_workers"]
    assert nursery.run(1, parsed_defaults, "cpu") == [(gloo, workers)]
    assert nursery.run(1, parsed_defaults, "cpu", "--num-workers", "3") == [(gloo, 3)]
    assert nursery.run(1, parsed_defaults, "cuda") == [("nccl", 2)]


def complaint_of(*argv: str) -> str:
    try:
        parse("cpu", *argv)
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--dion-scale-mode", "big"], "--dion-scale-mode: invalid choice: 'big'"),
        (["--dion-rank-fraction", "x"], "--dion-rank-fraction: invalid float value: 'x'"),
        (["--optimizer", "adamant"], "--optimizer: invalid choice: 'adamant'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    argv: list[str], message: str, nursery: Nursery
) -> None:
    [complaint] = nursery.run(1, complaint_of, *argv)
    assert message in complaint
    assert "\n" not in complaint


def metrics(run_dir: Path, kind: str) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


ADAM = ["--optimizer", "adam", "--train-iters", "4"]


@pytest.fixture(scope="module")
def one_process(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    evaluation = ["--eval-iters", "1", "--eval-interval", "2", "--split", "80,10,10"]
    nursery.pretrain(1, *ADAM, *evaluation, "--run-dir", str(run_dir))
    return run_dir


def test_stock_adam_leaves_a_run_directory(one_process: Path) -> None:
    names = {path.name for path in one_process.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "starts.jsonl", "loss.png"}
    training = metrics(one_process, "train")
    assert [record["iteration"] for record in training] == [1, 2, 3, 4]
    assert [record["tokens"] for record in training] == [12 * 32 * i for i in (1, 2, 3, 4)]
    assert all(record["iteration_seconds"] > record["optimizer_seconds"] > 0 for record in training)
    assert [record["iteration"] for record in metrics(one_process, "validation")] == [2, 4]
    assert len(metrics(one_process, "test")) == 1
    config = json.loads((one_process / "config.json").read_text())
    assert config["arguments"]["distributed_backend"] == "gloo"
    assert config["defaults"]["hidden_dropout"] == 0.1
    [start] = map(json.loads, (one_process / "starts.jsonl").read_text().splitlines())
    assert (start["iteration"], start["world_size"]) == (0, 1)


@pytest.mark.parametrize(
    "topology",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        "--context-parallel-size 2",
    ],
)
def test_stock_adam_does_not_depend_on_the_topology(
    topology: str, one_process: Path, nursery: Nursery, tmp_path: Path
) -> None:
    nursery.pretrain(2, *ADAM, *topology.split(), "--run-dir", str(tmp_path))
    for found, expected in zip(
        metrics(tmp_path, "train"), metrics(one_process, "train"), strict=True
    ):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], abs=2e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def losses(run_dir: Path) -> list[float]:
    return [record["lm_loss"] for record in metrics(run_dir, "train")]


def test_recomputing_repeats_the_same_dropout(nursery: Nursery, tmp_path: Path) -> None:
    dropout = ["--attention-dropout", "0.2", "--hidden-dropout", "0.2"]
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    tensor_parallel = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    for name, options in (("kept", []), ("recomputed", recompute.split())):
        run_dir = ["--run-dir", str(tmp_path / name)]
        nursery.pretrain(2, *ADAM, *dropout, *tensor_parallel, *options, *run_dir)
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed")


def test_stock_adam_resumes_where_it_stopped(nursery: Nursery, tmp_path: Path) -> None:
    checkpoint, run_dir = str(tmp_path / "checkpoint"), tmp_path / "run"
    options = [*ADAM, "--use-distributed-optimizer", "--run-dir", str(run_dir)]
    options += ["--dist-ckpt-optim-fully-reshardable", "--hidden-dropout", "0.2"]
    nursery.pretrain(2, *options, "--save", checkpoint, "--save-interval", "2")
    uninterrupted = losses(run_dir)
    nursery.pretrain(2, *options, "--load", checkpoint, "--ckpt-step", "2")
    assert losses(run_dir) == uninterrupted


@pytest.mark.parametrize("options", ["", "--bf16 --use-distributed-optimizer"])
def test_stock_muon_trains(options: str, nursery: Nursery, tmp_path: Path) -> None:
    muon = ["--optimizer", "muon", "--train-iters", "4", *options.split()]
    nursery.pretrain(2, *muon, "--run-dir", str(tmp_path))
    first, *_, last = losses(tmp_path)
    assert last < first


def train_and_exit_code(*argv: str) -> object:
    from megatron_dion.megatron import main

    with contextlib.redirect_stderr(io.StringIO()) as output:
        try:
            main(argv)
        except SystemExit as exit_:
            return exit_.code, output.getvalue()
    return None


def test_main_ends_with_one_line_and_code_2(nursery: Nursery) -> None:
    [(code, output)] = nursery.run(
        1,
        train_and_exit_code,
        *MODEL,
        *TRAINING,
        "--train-iters",
        "1",
        *["--max-position-embeddings", "16"],
    )
    assert code == 2
    last = output.splitlines()[-1]
    assert last.startswith("error: megatron refuses these arguments: ")
