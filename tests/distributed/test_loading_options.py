"""What of a checkpoint a run takes, when it is another run than the one that saved."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion.checkpointing.contents import Contents
from megatron_dion.checkpointing.folders import folder_of
from megatron_dion_tools.saved_matrices import saved_matrices
from tests.distributed.nursery import DION, MODEL, TRAINING, Nursery, losses, read_metrics
from tests.unit.test_command_line import exit_of

ADAM = "--optimizer adam --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()
COMMON = [
    *MODEL, *TRAINING, "--num-layers", "2", "--seq-length", "16", "--max-position-embeddings", "16",
    "--train-iters", "8", "--override-opt-param-scheduler",
]  # fmt: skip
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2_DP2 = "--pipeline-model-parallel-size 2 --micro-batch-size 6"
GRIDS = {"single": (1, ""), "dp2": (2, ""), "tp2-dp2": (4, TP2), "pp2-dp2": (4, PP2_DP2)}


def run(nursery: Nursery, grid: str, *flags: str, code: int = 0) -> str:
    """What the first rank said; the run has to end with the code."""
    ranks, grid_flags = GRIDS[grid]
    argv = [*COMMON, *grid_flags.split(), *flags]
    everything = nursery.run(ranks, exit_of_rank, argv)
    for found, said in everything:
        assert found == code, said[-3000:]
    return str(everything[0][1])


def exit_of_rank(argv: Sequence[str]) -> tuple[object, str]:
    """On a rank: its exit code and all that it says; none waits for a launcher to end it."""
    from megatron_dion.megatron import errors

    errors._LAUNCHER_GRACE_SECONDS = 0.0
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code, complaint = exit_of(list(argv))
    return code, said.getvalue() + complaint


def save(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", "4", "--run-dir", str(folder / "run")]


def load(folder: Path, run_dir: Path | None = None) -> list[str]:
    flags = ["--load", str(folder), "--ckpt-step", "4"]
    return flags if run_dir is None else [*flags, "--run-dir", str(run_dir)]


def tensors(folder: Path, iteration: int, kind: str) -> dict[str, Tensor]:
    """A kind of state of all logical matrices in a checkpoint."""
    contents = Contents(folder_of(folder, iteration))
    matrices, problems = saved_matrices(contents)
    assert not problems
    return {matrix.name: contents.read(matrix.key(kind)) for matrix in matrices}


def optimizer_state(nursery: Nursery, folder: Path, iteration: int) -> dict[str, Any]:
    """What all ranks share of it; read where Megatron has been imported already."""
    state: dict[str, Any] = nursery.call(read_optimizer_state, folder_of(folder, iteration))
    return state


def read_optimizer_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = Contents(folder).common["optimizer"]
    return {key: state[key] for key in ("dion", "steps")}


@pytest.fixture(scope="module")
def dion(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dion")
    run(nursery, "tp2-dp2", *DION, "--bf16", *save(folder))
    return folder


@pytest.fixture(scope="module")
def adam(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adam")
    run(nursery, "tp2-dp2", *ADAM, "--bf16", *save(folder))
    return folder


def resave(nursery: Nursery, grid: str, folder: Path, *flags: str) -> str:
    """Loads what other flags say, and saves it at once as iteration 5: one step at lr 0."""
    still = "--lr 0 --min-lr 0 --weight-decay 0 --lr-warmup-iters 0".split()
    still += "--save-interval 100 --exit-interval 5".split()
    return run(nursery, grid, *flags, "--save", str(folder), *still)


def masters_of_adam(folder: Path, iteration: int) -> dict[str, Tensor]:
    """Master weights of a checkpoint of Adam's, by Megatron's keys."""
    contents = Contents(folder_of(folder, iteration))
    prefix = "optimizer.state.param."
    keys = [key for key in contents.tensors if key.startswith(prefix)]
    return {key.removeprefix(prefix): contents.read(key) for key in keys}


def assert_same_masters(dion: dict[str, Tensor], adam: dict[str, Tensor]) -> None:
    """Logical matrices hold the numbers of Megatron's fused and stacked weights."""
    for layer in range(2):
        name, stacked = f"decoder.layers.{layer}.", "decoder.layers."
        gate, up = (dion[f"{name}mlp.linear_fc1.weight[{part}]"] for part in ("gate", "up"))
        fc1 = adam[f"{stacked}mlp.linear_fc1.weight"][layer]
        assert torch.equal(torch.cat([gate, up]), fc1)
        for linear in ("mlp.linear_fc2", "self_attention.linear_proj"):
            expected = adam[f"{stacked}{linear}.weight"][layer]
            assert torch.equal(dion[f"{name}{linear}.weight"], expected)
        qkv = "self_attention.linear_qkv.weight"
        parts = [dion[f"{name}{qkv}[{part}]"] for part in ("query", "key", "value")]
        groups = [part.chunk(2) for part in parts]
        fused = torch.cat([part[group] for group in range(2) for part in groups])
        assert torch.equal(fused, adam[f"{stacked}{qkv}"][layer])


@pytest.mark.parametrize("grid", ["single", "tp2-dp2", "pp2-dp2"])
def test_adam_to_dion_keeps_masters(
    nursery: Nursery, adam: Path, tmp_path: Path, grid: str
) -> None:
    flags = [*DION, "--bf16", "--switch-optimizer", *load(adam)]
    said = resave(nursery, grid, tmp_path, *flags)
    assert "from --optimizer adam to --optimizer dion: master weights, and the state" in said
    assert_same_masters(tensors(tmp_path, 5, "weight"), masters_of_adam(adam, 4))
    assert "dion" in optimizer_state(nursery, tmp_path, 5)


@pytest.mark.parametrize("grid", ["single", "tp2-dp2", "pp2-dp2"])
def test_dion_to_adam_keeps_masters(
    nursery: Nursery, dion: Path, tmp_path: Path, grid: str
) -> None:
    flags = [*ADAM, "--bf16", "--switch-optimizer", *load(dion)]
    said = resave(nursery, grid, tmp_path, *flags)
    assert "from --optimizer dion to --optimizer adam: master weights are kept" in said
    assert_same_masters(tensors(dion, 4, "weight"), masters_of_adam(tmp_path, 5))


def test_switched_runs_go_on_and_learn(
    nursery: Nursery, adam: Path, dion: Path, tmp_path: Path
) -> None:
    for name, flags, source in (("dion", DION, adam), ("adam", ADAM, dion)):
        run_dir = tmp_path / name
        argv = [*flags, "--bf16", "--switch-optimizer", *load(source, run_dir)]
        run(nursery, "dp2", *argv)
        found = read_metrics(run_dir)
        assert [entry["iteration"] for entry in found] == [5, 6, 7, 8]
        before = losses(source / "run")
        assert found[0]["lm_loss"] == pytest.approx(before[4], abs=5e-3)
        assert found[-1]["lm_loss"] < before[3]


def test_scalar_state_of_adam_goes_on_beside_dion(
    nursery: Nursery, adam: Path, tmp_path: Path
) -> None:
    flags = [*DION, "--bf16", "--switch-optimizer", *load(adam)]
    resave(nursery, "dp2", tmp_path, *flags)
    before, after = Contents(folder_of(adam, 4)), Contents(folder_of(tmp_path, 5))
    key = "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"
    # One step with beta2 0.999: nearly all of it is the old state.
    old, new = before.read(key), after.read(key)
    assert (new >= 0.998 * old).all()
    assert optimizer_state(nursery, tmp_path, 5)["steps"] == {"dion": 1, "scalar": 5}


def test_other_optimizer_without_the_flag(nursery: Nursery, adam: Path, dion: Path) -> None:
    said = run(nursery, "dp2", *DION, "--bf16", *load(adam), code=2)
    assert "was saved with --optimizer adam, and this run has --optimizer dion" in said
    assert "--switch-optimizer keeps its master weights" in said
    said = run(nursery, "dp2", *ADAM, "--bf16", *load(dion), code=2)
    assert "was saved with --optimizer dion, and this run has --optimizer adam" in said


def test_masters_of_one_layout_only(nursery: Nursery, tmp_path: Path) -> None:
    """Megatron's default format cannot be read by another layout."""
    run(nursery, "dp2", *ADAM[:-1], *save(tmp_path))
    said = run(nursery, "dp2", *DION, "--switch-optimizer", *load(tmp_path), code=2)
    assert "save it again with --dist-ckpt-optim-fully-reshardable" in said


def test_switch_has_nothing_to_do(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    """The command line of a run that is restarted from its own checkpoints stays the same."""
    run(nursery, "tp2-dp2", *DION, "--bf16", "--switch-optimizer", *load(dion, tmp_path))
    assert losses(tmp_path) == losses(dion / "run")[4:]


CHANGES = {
    "rank": ("--dion-rank-fraction 0.5", "--dion-rank-fraction 0.25 (saved), 0.5 (here)"),
    "heads": ("--dion-split gate,heads", "--dion-split gate,qkv (saved), gate,heads (here)"),
    "whole": ("--dion-split none", "--dion-split gate,qkv (saved), none (here)"),
    "orth": ("--dion-right-factor orth", "--dion-right-factor colnorm (saved), orth (here)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_factors_have_to_be_asked_for(
    nursery: Nursery, dion: Path, tmp_path: Path, change: str
) -> None:
    flags, named = CHANGES[change]
    argv = [*DION, "--bf16", *flags.split(), *load(dion)]
    refused = run(nursery, "dp2", *argv, code=2)
    assert named in refused
    assert "--dion-reinit-factors" in refused
    said = run(nursery, "pp2-dp2", *argv, "--dion-reinit-factors", "--run-dir", str(tmp_path))
    assert "right factors begin anew, momenta are kept" in said
    assert named in said
    found = losses(tmp_path)
    assert found[0] == pytest.approx(losses(dion / "run")[4], abs=5e-3)
    assert found[-1] < losses(dion / "run")[3]


def test_reinit_keeps_momenta_across_splits(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    """A step that neither learns nor forgets: with mu -> 1 and no gradient M stays as it is."""
    flags = "--dion-split none --dion-reinit-factors --dion-momentum 0.9999999".split()
    # Gradients are clipped to nothing.
    argv = [*DION, "--bf16", *flags, "--clip-grad", "1e-30", *load(dion)]
    said = resave(nursery, "tp2-dp2", tmp_path, *argv)
    assert "changed since it was saved: --dion-momentum 0.95 (saved)" in said
    before, after = tensors(dion, 4, "momentum"), tensors(tmp_path, 5, "momentum")
    for layer in range(2):
        name = f"decoder.layers.{layer}.mlp.linear_fc1.weight"
        joined = torch.cat([before[f"{name}[gate]"], before[f"{name}[up]"]])
        torch.testing.assert_close(after[name], joined, rtol=1e-5, atol=1e-7)
        assert joined.abs().max() > 0
        name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
        parts = [before[f"{name}[{part}]"].chunk(2) for part in ("query", "key", "value")]
        fused = torch.cat([part[group] for group in range(2) for part in parts])
        torch.testing.assert_close(after[name], fused, rtol=1e-5, atol=1e-7)


def test_other_routes_and_scalar_optimizer(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    exclude = ["--dion-exclude", "*.linear_proj.weight"]
    said = run(nursery, "dp2", *DION, "--bf16", *exclude, *load(dion), code=2)
    assert "--dion-exclude none (saved), *.linear_proj.weight (here)" in said
    lion = "--dion-scalar-optimizer lion --dion-scalar-lr-mult 0.1".split()
    said = run(nursery, "dp2", *DION, "--bf16", *lion, *load(dion), code=2)
    assert "--dion-scalar-optimizer adam (saved), lion (here)" in said
    argv = [*DION, "--bf16", *lion, "--switch-optimizer", *load(dion)]
    said = resave(nursery, "dp2", tmp_path, *argv)
    assert "state of scalar parameters begins anew" in said
    assert optimizer_state(nursery, tmp_path, 5)["steps"] == {
        "dion": 5,
        "scalar": 0,
    }  # Lion itself counts none


def test_model_only(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    """--finetune begins at iteration 0, --no-load-optim goes on with fresh state."""
    for name, flag, first in (("finetune", "--finetune", 1), ("state", "--no-load-optim", 5)):
        run_dir = tmp_path / name
        # What does not concern the model does not matter.
        argv = [*DION, "--bf16", flag, "--dion-rank-fraction", "0.5", *load(dion, run_dir)]
        said = run(nursery, "dp2", *argv)
        assert ("all optimizer state begins anew" in said) == (first == 5)
        found = read_metrics(run_dir)
        assert found[0]["iteration"] == first
        if first == 5:
            assert found[0]["lm_loss"] == pytest.approx(losses(dion / "run")[4], abs=5e-3)


def test_pretrained_checkpoint(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    """As --finetune, until the run has a checkpoint of its own."""
    folder = tmp_path / "own"
    argv = [*DION, "--bf16", "--pretrained-checkpoint", str(dion), "--load", str(folder)]
    # A rank makes the folder for what it will save, perhaps before another looks.
    folder.mkdir()
    said = run(nursery, "dp2", *argv, *save(folder))
    assert f"--load {folder} holds no checkpoint: starting from iteration 0" in said
    assert read_metrics(folder / "run")[0]["iteration"] == 1
    run(nursery, "dp2", *argv, "--ckpt-step", "4", "--run-dir", str(tmp_path / "resumed"))
    assert losses(tmp_path / "resumed") == losses(folder / "run")[4:]


def test_arguments_of_the_checkpoint(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    """The shape of the model is read from the checkpoint; the default would be another."""
    keep = [
        *TRAINING, "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "250",
        "--train-iters", "8", "--override-opt-param-scheduler", "--bf16",
    ]  # fmt: skip
    argv = [*DION, *keep, "--use-checkpoint-args", *load(dion, tmp_path)]
    argv += TP2.split()
    for code, said in nursery.run(4, exit_of_rank, argv):
        assert code == 0, said
    assert losses(tmp_path) == losses(dion / "run")[4:]


def test_arguments_of_a_damaged_checkpoint(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dion, tmp_path / "copy"))
    (folder_of(folder, 4) / ".metadata").write_bytes(b"junk")
    argv = [*DION, "--bf16", "--use-checkpoint-args", *load(folder)]
    said = run(nursery, "dp2", *argv, code=2)
    assert f"{folder_of(folder, 4)} cannot be loaded into this run" in said


def test_ranks_that_see_other_checkpoints(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    """One of them sees none, as on a node where the folder is not mounted."""
    argv = [*COMMON, *DION, "--bf16", "--load", str(dion), "--save", str(dion)]
    argv += ["--save-interval", "100"]
    for code, said in nursery.run(2, exit_with_folder_elsewhere, argv, str(tmp_path)):
        assert code == 2, said[-3000:]
        assert "the ranks see other checkpoints" in said


def exit_with_folder_elsewhere(argv: Sequence[str], other: str) -> tuple[object, str]:
    if os.environ["RANK"] == "1":
        argv = [other if one == argv[argv.index("--load") + 1] else one for one in argv]
    return exit_of_rank(argv)


def test_saved_without_optimizer(nursery: Nursery, tmp_path: Path) -> None:
    run(nursery, "dp2", *DION, "--no-save-optim", *save(tmp_path))
    said = run(nursery, "dp2", *DION, *load(tmp_path), code=2)
    assert "was saved without optimizer state (--no-save-optim)" in said


def test_schedule_of_the_checkpoint(nursery: Nursery, dion: Path) -> None:
    """Megatron would go on with the learning rate of the command line."""
    argv = [word for word in COMMON if word != "--override-opt-param-scheduler"]
    ranks, _ = GRIDS["dp2"]
    saved = [*argv, *DION, "--bf16", *load(dion), "--lr", "1e-3"]
    [(code, said), _] = nursery.run(ranks, exit_of_rank, saved)
    assert code == 2
    assert "learning rate do not match: --override-opt-param-scheduler takes" in said
    flag = "--use-checkpoint-opt-param-scheduler"
    [(code, said), _] = nursery.run(ranks, exit_of_rank, [*saved, flag])
    assert code == 2
    assert f"{flag}: " in said
    assert "has --lr 0.004" in said


def test_experts_change_the_number_of_optimizers(nursery: Nursery, tmp_path: Path) -> None:
    """Where Megatron's own chain stops with "Expected 2 entries in state dict"."""
    experts = (
        "--num-experts 4 --moe-router-topk 4 --moe-router-load-balancing-type none"
        " --moe-token-dispatcher-type alltoall --moe-ffn-hidden-size 24 --clip-grad 0"
    ).split()
    ep2 = ["--expert-model-parallel-size", "2"]
    for name, there, here in (("more", [], ep2), ("fewer", ep2, [])):
        folder, run_dir = tmp_path / name, tmp_path / f"{name}-resumed"
        run(nursery, "dp2", *DION, *experts, *there, *save(folder))
        run(nursery, "dp2", *DION, *experts, *here, *load(folder, run_dir))
        pairs: Any = zip(losses(run_dir), losses(folder / "run")[4:], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 2e-5


def exit_without_the_join(argv: Sequence[str]) -> tuple[object, str]:
    """On a rank: as in a script that uses the optimizer, but not this project's training."""
    from megatron_dion.megatron import checkpoints

    checkpoints.use = lambda choice, args: None
    return exit_of_rank(argv)


def test_optimizer_guards_itself(nursery: Nursery, dion: Path, tmp_path: Path) -> None:
    argv = [*COMMON, *DION, "--bf16", *TP2.split(), *load(dion, tmp_path)]
    for code, said in nursery.run(4, exit_without_the_join, argv):
        assert code == 0, said[-3000:]
    assert losses(tmp_path) == losses(dion / "run")[4:]
    orth = [*argv, "--dion-right-factor", "orth"]
    for code, said in nursery.run(4, exit_without_the_join, orth):
        assert code == 2
        assert "of another run: --dion-right-factor colnorm (saved), orth (here)" in said


def test_own_checkpoint_wins_over_a_pretrained_one(
    nursery: Nursery, dion: Path, tmp_path: Path
) -> None:
    """Megatron would take the other one where the tracker was not written any more."""
    folder = tmp_path / "own"
    own = [*DION, "--bf16", "--load", str(folder), *save(folder)]
    run(nursery, "dp2", *own)
    (folder / "latest_checkpointed_iteration.txt").unlink()
    more = ["--pretrained-checkpoint", str(dion), "--train-iters", "9"]
    said = run(nursery, "dp2", *own, *more)
    assert "iteration 8, the newest complete checkpoint, is taken" in said
    assert f"successfully loaded checkpoint from {folder}" in said
    assert "at iteration 8\n" in said
    training = read_metrics(folder / "run")
    assert [entry["iteration"] for entry in training] == list(range(1, 10))
    starts = map(json.loads, (folder / "run" / "starts.jsonl").read_text().splitlines())
    facts = [(start["iteration"], start["tokens"], start["data_parallel_size"]) for start in starts]
    assert facts == [(0, 0, 2), (8, training[7]["tokens"], 2)]
