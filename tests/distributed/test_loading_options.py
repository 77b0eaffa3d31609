"""What of a checkpoint a run takes, when it is another run than the one that saved."""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.checkpointing.contents import Contents
from megatron_dion.checkpointing.folders import folder_of
from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion.optimizer.record import Record
from megatron_dion.optimizer.rules import RoutingRules
from tests.distributed.tiny_gpt import DION, MODEL, TP2, TRAINING, losses, records_of
from tests.unit.test_command_line import exit_of_rank
from tests.worlds import in_host, world

ADAM = "--optimizer adam --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()
COMMON = [
    *MODEL, *TRAINING, "--num-layers", "2", "--seq-length", "16", "--max-position-embeddings", "16",
    "--train-iters", "8", "--override-opt-param-scheduler", "--bf16",
]  # fmt: skip
PP2_DP2 = "--pipeline-model-parallel-size 2 --micro-batch-size 6"
GRIDS = {"single": (1, ""), "dp2": (2, ""), "tp2-dp2": (4, TP2), "pp2-dp2": (4, PP2_DP2)}
# No step is taken: what was loaded is saved again.
RESAVE = "--train-iters 4 --save-interval 100 --save".split()
SLOW = pytest.mark.slow


def run(grid: str, *flags: str, code: int = 0) -> str:
    """What the first rank said; the run has to end with the code."""
    ranks, grid_flags = GRIDS[grid]
    return run_argv(ranks, [*COMMON, *grid_flags.split(), *flags], code)


def run_argv(ranks: int, argv: Sequence[str], code: int = 0, prepare: Any = list) -> str:
    everything = world(ranks).fork(exit_when_prepared, prepare, argv)
    for found, said in everything:
        assert found == code, said[-3000:]
    return str(everything[0][1])


def exit_when_prepared(prepare: Any, argv: Sequence[str]) -> tuple[object, str]:
    return exit_of_rank(prepare(argv))


def save(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", "4", "--run-dir", str(folder / "run")]


def load(folder: Path, run_dir: Path | None = None) -> list[str]:
    flags = ["--load", str(folder), "--ckpt-step", "4"]
    return flags if run_dir is None else [*flags, "--run-dir", str(run_dir)]


def steps(folder: Path) -> Any:
    """Read where Megatron has been imported already."""
    return Contents(folder_of(folder, 4)).common["optimizer"]["steps"]


@pytest.fixture(scope="module")
def dion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dion")
    run("tp2-dp2", *DION, *save(folder))
    return folder


@pytest.fixture(scope="module")
def adam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adam")
    run("tp2-dp2", *ADAM, *save(folder))
    return folder


def state(folder: Path, kind: str, iteration: int = 4) -> dict[str, Tensor]:
    """A kind of optimizer state of a checkpoint."""
    contents, prefix = Contents(folder_of(folder, iteration)), f"optimizer.state.{kind}."
    found = contents.read(*(key for key in contents.tensors if key.startswith(prefix)))
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


@pytest.mark.parametrize(
    ("there", "back"), [("tp2-dp2", "pp2-dp2"), pytest.param("single", "single", marks=SLOW)]
)
def test_adam_to_dion_and_back_keeps_masters(
    adam: Path, tmp_path: Path, there: str, back: str
) -> None:
    saved = tmp_path / "dion"
    said = run(there, *DION, "--switch-optimizer", *load(adam), *RESAVE, str(saved))
    assert "from --optimizer adam to --optimizer dion: master weights, and the state" in said
    for kind in ("param", "exp_avg", "exp_avg_sq"):  # of what stays with Adam
        found, expected = state(saved, kind), state(adam, kind)
        assert "output_layer.weight" in found
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert in_host(steps, saved) == {"dion": 0, "scalar": 4}
    # Megatron's Adam has no state to save before its first step.
    still = "--train-iters 5 --lr 0 --min-lr 0 --weight-decay 0 --lr-warmup-iters 0".split()
    argv = [*ADAM, "--switch-optimizer", *load(saved), *RESAVE[2:], str(tmp_path), *still]
    said = run(back, *argv)
    assert "from --optimizer dion to --optimizer adam: master weights are kept" in said
    before, after = state(adam, "param"), state(tmp_path, "param", 5)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("to", ["dion", "adam"])
def test_switched_runs_go_on_and_learn(adam: Path, dion: Path, tmp_path: Path, to: str) -> None:
    flags, source = (DION, adam) if to == "dion" else (ADAM, dion)
    run("dp2", *flags, "--switch-optimizer", *load(source, tmp_path))
    found, before = records_of(tmp_path), losses(source / "run")
    assert [entry["iteration"] for entry in found] == [5, 6, 7, 8]
    assert found[0]["lm_loss"] == pytest.approx(before[4], abs=5e-3)
    assert found[-1]["lm_loss"] < before[3]


@pytest.mark.parametrize(
    ("saving", "there"),
    [("--dist-ckpt-optim-fully-reshardable", "dp2"), pytest.param("", "tp2-dp2", marks=SLOW)],
)
def test_muon_to_dion_keeps_masters_and_momenta(tmp_path: Path, saving: str, there: str) -> None:
    """Of a weight that Dion does not split, and of what both leave to Adam."""
    muon, saved = tmp_path / "muon", tmp_path / "dion"
    flags = f"--optimizer muon --use-distributed-optimizer {saving}".split()
    run("tp2-dp2", *flags, *save(muon))
    argv = [*DION, "--switch-optimizer", "--dion-momentum", "0.8", *load(muon)]
    said = run(there, *argv, *RESAVE, str(saved))
    assert "dion: master weights, momenta, and the state of scalar parameters, are kept" in said
    contents = Contents(folder_of(muon, 4))
    for kind, weights in (
        ("fp32_param", {"decoder.layers.{}.mlp.linear_fc2.weight": "dion.weight"}),
        ("momentum_buffer", {"decoder.layers.{}.mlp.linear_fc2.weight": "dion.momentum"}),
        ("exp_avg", {"output_layer.weight": "exp_avg"}),
    ):
        [(name, found)] = weights.items()
        [key] = (k for k in contents.tensors if f"{kind}.{name.replace('.{}', '')}" in k)
        expected = contents.read(key)[key].reshape(-1, *state(saved, found)[name.format(0)].shape)
        assert expected.any()
        for layer, tensor in enumerate(expected):
            # 1 / (1 - 0.9) of a mean of gradients is their sum, of which Dion keeps 0.8.
            scale = 8.0 if kind == "momentum_buffer" else 1.0
            torch.testing.assert_close(state(saved, found)[name.format(layer)], tensor * scale)
    run(there, *argv, "--run-dir", str(tmp_path))
    assert losses(tmp_path)[0] == pytest.approx(losses(muon / "run")[4], abs=5e-3)
    assert losses(tmp_path)[-1] < losses(muon / "run")[3]


def roundings(master: Tensor) -> list[bool]:
    """On a rank: what is taken for the master weights that a weight in bf16, fp16 or fp32 has."""
    from megatron_dion.optimizer.checkpoint import is_rounded

    found = []
    for saved, here in product((torch.bfloat16, torch.float16, torch.float32), repeat=2):
        weight = master.to(saved).to(here)
        found.append(is_rounded(master, weight, saved))
        wrong = master * (1 + (2e-7 if saved == here == torch.float32 else 5e-3))
        found.append(not is_rounded(wrong, weight, saved))
    return found


def test_masters_are_known_by_their_rounding() -> None:
    """Also ties and subnormal numbers."""
    torch.manual_seed(1)
    bits = torch.randint(0x3000, 0x4400, (10000,)) << 16  # 1e-10 to 500 as bf16 has them
    masters = bits.int().view(torch.float32) + torch.randn(10000) * 1e-5
    ties = (bits + 0x8000).int().view(torch.float32)
    [found] = world(1).fork(roundings, torch.cat([masters, ties, -ties]))
    assert all(found), found


def rounded_to(saved: Sequence[dict[str, Any]]) -> list[torch.dtype | None]:
    """On a rank: how the weights of AdamW's checkpoints are rounded that these arguments wrote."""
    from megatron_dion.megatron.checkpoints import Choice, Facts, Loader

    here = Namespace(optimizer="dion", switch_optimizer=True)
    loader = Loader(Choice(Path(), 4), here, False)
    record = Record(DionConfig(), RoutingRules(), "adam")
    facts = (Facts("adam", None, True, Namespace(**args), {}, None) for args in saved)
    return [loader._switch(one, record).dtype for one in facts]


def test_masters_of_weights_with_scales_are_not_compared() -> None:
    bf16: dict[str, Any] = {"params_dtype": torch.bfloat16}
    [found] = world(1).fork(rounded_to, [bf16, bf16 | {"fp8_param_gather": True}])
    assert found == [torch.bfloat16, None]


@pytest.mark.parametrize("dtype", ["--bf16", "--no-gradient-accumulation-fusion"])
def test_wrong_masters_are_refused(tmp_path: Path, dtype: str) -> None:
    """Megatron 0.19.2 writes them at wrong offsets behind a bucket that is padded."""
    common = [dtype if word == "--bf16" else word for word in COMMON]
    buckets = "--overlap-grad-reduce --ddp-bucket-size 3000".split()
    run_argv(1, [*common, *ADAM, *buckets, *save(tmp_path), "--train-iters", "4"])
    said = run_argv(1, [*common, *DION, "--switch-optimizer", *load(tmp_path)], 2)
    assert "master weights in it are not the weights of the model beside them: decoder." in said


def test_a_model_in_fp32_is_its_own_master(tmp_path: Path) -> None:
    """Where AdamW is not distributed, a checkpoint has its weights once."""
    common = [word for word in COMMON if word != "--bf16"]
    run_argv(2, [*common, "--optimizer", "adam", *save(tmp_path)])
    argv = [*DION, "--switch-optimizer", *load(tmp_path, tmp_path / "dion")]
    assert "master weights, and the state of scalar" in run_argv(2, [*common, *argv])
    assert losses(tmp_path / "dion")[0] == pytest.approx(losses(tmp_path / "run")[4], abs=1e-6)
    assert "leave out --bf16" in run_argv(2, [*COMMON, *argv], 2)


def test_fp32_adam_goes_on_from_the_default_format(tmp_path: Path) -> None:
    """Megatron 0.19.2 by itself ends with an error of autograd."""
    common = [word for word in COMMON if word not in ("--bf16", "--override-opt-param-scheduler")]
    run_argv(1, [*common, *ADAM[:-1], *save(tmp_path)])
    run_argv(1, [*common, *ADAM[:-1], *load(tmp_path, tmp_path / "resumed")])
    assert losses(tmp_path / "resumed") == losses(tmp_path / "run")[4:]


def test_vocabulary_of_another_padding(dion: Path, tmp_path: Path) -> None:
    at = COMMON.index("--padded-vocab-size")
    other = [*COMMON[:at], *COMMON[at + 2 :], "--make-vocab-size-divisible-by", "48"]
    argv = [*DION, *load(dion, tmp_path)]
    named = "--padded-vocab-size 256 (saved), 288 (here)"
    assert f"{named}: add --padded-vocab-size with" in run_argv(2, [*other, *argv], 2)
    argv += (
        "--padded-vocab-size 288 --vocab-size 249 --rotary-base 20000 --norm-epsilon 1e-4".split()
    )
    said = run_argv(2, [*other, *argv])
    assert f"{named}: the rows" in said
    changed = "vocab_size 250 (saved), 249 (here); rotary_base 10000 (saved), 20000 (here); "
    changed += "layernorm_epsilon 1e-05 (saved), 0.0001 (here)"
    assert f"the configuration of the model has changed since it was saved: {changed}\n" in said
    assert "it was trained with another tokenizer" in said
    assert losses(tmp_path)[0] == pytest.approx(losses(dion / "run")[4], abs=0.2)


def test_evaluating_loses_nothing(dion: Path, tmp_path: Path) -> None:
    """Nor does a run that trains nothing; what an iteration replaces is set aside."""
    folder = tmp_path / "run"
    shutil.copytree(dion / "run", folder)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    run("dp2", *DION, *load(dion, folder), *"--skip-train --eval-iters 1".split())
    assert [line["iteration"] for line in records_of(folder, "validation")] == [4]
    after = {path.name: path.read_text() for path in folder.iterdir()}
    assert after["metrics.jsonl"].startswith(before.pop("metrics.jsonl"))
    assert after.items() >= before.items()
    run("dp2", *DION, "--dion-rank-fraction", "0.5", *load(dion, folder), code=2)
    assert {path.name: path.read_text() for path in folder.iterdir()} == after
    run("dp2", *DION, *load(dion, folder), *"--train-iters 4".split())
    assert len(records_of(folder)) == 8
    assert (folder / "config.json").read_text() == after["config.json"]
    run("dp2", *DION, *load(dion, folder), *"--train-iters 6".split())
    assert [line["iteration"] for line in records_of(folder)] == [1, 2, 3, 4, 5, 6]
    assert [one["iteration"] for one in read_metrics(folder / "metrics.replaced.jsonl")] == [
        *(5, 6, 7, 8)
    ]


def test_other_factors_have_to_be_asked_for(dion: Path, tmp_path: Path) -> None:
    named = "--dion-rank-fraction 0.25 (saved), 0.5 (here)"
    argv = [*DION, "--dion-rank-fraction", "0.5", *load(dion, tmp_path)]
    assert f"{named}: use the saved values, or --dion-reinit" in run("dp2", *argv, code=2)
    said = run("dp2", *argv, "--dion-reinit-factors")
    assert f"right factors begin anew, momenta are kept: {named}" in said
    assert losses(tmp_path)[0] == pytest.approx(losses(dion / "run")[4], abs=5e-3)
    assert losses(tmp_path)[-1] < losses(dion / "run")[3]


def test_reinit_keeps_momenta_across_splits(dion: Path, tmp_path: Path) -> None:
    scale, momentum = "--dion-extra-scale-factor 2.0", "--dion-momentum 0.9"
    argv = [*DION, *f"{scale} {momentum} --dion-reinit-factors".split()]
    whole, split = tmp_path / "whole", tmp_path / "split"
    resave = [*RESAVE, str(whole), "--dion-split", "none"]
    said = run("tp2-dp2", *argv, *load(dion), *resave)
    assert f"{scale.replace('2', '1')} (saved), 2.0 (here); --dion-momentum 0.95 (saved)" in said
    run("pp2-dp2", *argv, *load(whole), *RESAVE, str(split))
    before, fused, after = (state(folder, "dion.momentum") for folder in (dion, whole, split))
    assert len(fused) < len(before) == len(after)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(tensor.any() for tensor in before.values())


def test_other_scalar_optimizer(dion: Path, tmp_path: Path) -> None:
    argv = [*DION, *LION.split(), "--switch-optimizer", *load(dion), *RESAVE, str(tmp_path)]
    assert "state of scalar parameters begins anew" in run("dp2", *argv)
    assert in_host(steps, tmp_path) == {"dion": 4, "scalar": 0}


LION = "--dion-scalar-optimizer lion --dion-scalar-lr-mult 0.1"
RATES = ("--lr", "--decoupled", "--dion-scalar-lr-mult", "--apply-wd", "--weight", "--dion-extra")
SCHEDULE = "--use-checkpoint-opt-param-scheduler"
OTHER = "saved with --optimizer {}, and this run has --optimizer {}: --switch-optimizer"
SIZES, WEIGHTS = "x --global-batch-size", "--start-weight-decay 0.01 --end-weight-decay 0.2"
# The optimizer, more flags, the checkpoint's optimizer, and what the error says.
REFUSED: list[tuple[list[str], str, str, str]] = [
    (DION, "", "adam", OTHER.format("adam", "dion")),
    (ADAM, "", "dion", OTHER.format("dion", "adam")),
    (DION, "--dion-exclude *_proj.*", "dion", "--dion-exclude none (saved), *_proj.* (here)"),
    (DION, LION, "dion", "--dion-scalar-optimizer adam (saved), lion (here)"),
    (DION, "--lr 1e-3", "dion", "--lr 0.004 (saved), 0.001 (here): use the saved values, or --ov"),
    (DION, f"--lr 1e-3 {SCHEDULE}", "dion", "--lr 0.004 (saved), 0.001 (here)"),
    (DION, "--decoupled-lr 1e-3", "dion", "--decoupled-lr None (saved), 0.001 (here)"),
    (DION, "--decoupled-min-lr 1e-5", "dion", "--decoupled-min-lr None (saved), 1e-05 (here)"),
    (DION, "--weight-decay 0.2", "dion", "--weight-decay 0.1 (saved), 0.2 (here)"),
    (DION, "--lr-decay-iters 40 --global-batch-size 6", "dion", f"warmup-iters {SIZES} 24 (saved)"),
    (DION, "--weight-decay 0.2 --global-batch-size 6", "dion", "--weight-decay 0.1 (saved), 0.2"),
    (DION, f"--weight-decay 0.3 {SCHEDULE}", "dion", "--weight-decay 0.1 (saved), 0.3 (here)"),
    (DION, f"--weight-decay-incr-style linear {WEIGHTS}", "dion", "--start-weight-decay 0.1 (sav"),
    (DION, "--lr-decay-iters 9", "dion", "--lr-decay-iters 20 (saved), 9 (here): use the saved"),
    (DION, "--dion-extra-scale-factor 2", "dion", "1.0 (saved), 2.0 (here): use the saved values"),
    (DION, "--dion-scalar-lr-mult 2", "dion", "--dion-scalar-lr-mult 1.0 (saved), 2.0 (here)"),
    (DION, f"--apply-wd-to-qk-layernorm {SCHEDULE}", "dion", "--apply-wd-to-qk-layernorm"),
    (ADAM, "--decoupled-lr 1e-3", "adam", "--decoupled-lr None (saved), 0.001 (here)"),
    (ADAM, "--min-lr 1e-3", "adam", "0.001 (here): Megatron finds groups by these"),
]


@pytest.mark.parametrize(("optimizer", "flags", "saved", "reason"), REFUSED)
def test_refused(
    adam: Path, dion: Path, optimizer: Any, flags: str, saved: str, reason: str
) -> None:
    argv = [*COMMON, *optimizer, *flags.split(), *load(dion if saved == "dion" else adam)]
    if flags.startswith(RATES):  # Megatron would go on with those of the command line
        argv.remove("--override-opt-param-scheduler")
    assert reason in run_argv(2, argv, 2)


def test_what_was_not_saved_cannot_be_loaded(tmp_path: Path) -> None:
    for saved, flags, reason in (
        (ADAM[:-1], ["--switch-optimizer"], "--dist-ckpt-optim-fully-reshardable"),
        ([*DION, "--no-save-optim"], [], "was saved without optimizer state (--no-save-optim)"),
    ):
        run("single", *saved, *save(tmp_path), "--train-iters", "4")
        assert reason in run("single", *DION, *flags, *load(tmp_path), code=2)


def test_model_only(dion: Path, tmp_path: Path) -> None:
    """--finetune begins at iteration 0, --no-load-optim goes on with fresh state."""
    for flag, first in (("--finetune", 1), ("--no-load-optim", 5)):
        run_dir = tmp_path / flag
        # What does not concern the model does not matter.
        argv = [*DION, flag, "--dion-rank-fraction", "0.5", *load(dion, run_dir)]
        said = run("dp2", *argv)
        assert ("all optimizer state and the schedule begin anew" in said) == (first == 5)
        assert records_of(run_dir)[0]["iteration"] == first
    assert losses(run_dir)[0] == pytest.approx(losses(dion / "run")[4], abs=5e-3)


def test_pretrained_checkpoint(dion: Path, tmp_path: Path) -> None:
    """As --finetune, until the run has a checkpoint of its own, whose tracker may be missing."""
    folder = tmp_path / "own"
    argv = [*DION, "--pretrained-checkpoint", str(dion), "--load", str(folder), *save(folder)]
    # A rank makes the folder for what it will save, perhaps before another looks.
    folder.mkdir()
    said = run("dp2", *argv)
    assert f"--load {folder} holds no complete checkpoint: starting from iteration 0" in said
    (folder / "latest_checkpointed_iteration.txt").unlink()
    said = run("dp2", *argv, "--train-iters", "9")
    assert "iteration 8 is taken" in said
    training = records_of(folder / "run")
    assert [entry["iteration"] for entry in training] == list(range(1, 10))
    starts = map(json.loads, (folder / "run" / "starts.jsonl").read_text().splitlines())
    facts = [(start["iteration"], start["tokens"], start["data_parallel_size"]) for start in starts]
    assert facts == [(0, 0, 2), (8, training[7]["tokens"], 2)]


def test_arguments_of_the_checkpoint(dion: Path, tmp_path: Path) -> None:
    """The shape of the model is read from the checkpoint; the default would be another."""
    argv = [
        *TRAINING, "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "250",
        "--train-iters", "8", "--override-opt-param-scheduler", "--bf16", "--use-checkpoint-args",
    ]  # fmt: skip
    # Where a run is restarted from its own checkpoints, a switch has nothing to do.
    argv += [*DION, "--switch-optimizer", *load(dion, tmp_path), *TP2.split()]
    run_argv(4, argv)
    assert losses(tmp_path) == losses(dion / "run")[4:]


def test_arguments_of_a_checkpoint_that_is_not_there_yet(tmp_path: Path) -> None:
    """The command line that starts a run is the one that goes on with it."""
    at = COMMON.index("--group-query-attention")  # Megatron changes the number of groups without
    argv = [*COMMON[:at], *COMMON[at + 3 :], *DION, "--load", str(tmp_path), *save(tmp_path)]
    assert "starting from iteration 0" in run_argv(1, [*argv, "--use-checkpoint-args"])
    said = run_argv(1, argv)
    assert f"[dion] {folder_of(tmp_path, 8)}: loaded" in said
    assert "since it was saved" not in said


def look_elsewhere(argv: Sequence[str]) -> list[str]:
    """On a rank: the second sees no checkpoint, as on a node where the folder is not mounted."""
    folder = argv[argv.index("--load") + 1]
    is_second = os.environ["RANK"] == "1"
    return [f"{folder}/elsewhere" if is_second and one == folder else one for one in argv]


def test_ranks_that_see_other_checkpoints(dion: Path) -> None:
    argv = [*COMMON, *DION, "--load", str(dion), "--save", str(dion), "--save-interval", "100"]
    said = run_argv(2, argv, 2, look_elsewhere)
    assert "the ranks see other checkpoints" in said


def without_the_join(argv: Sequence[str]) -> Sequence[str]:
    """On a rank: as in a script that uses the optimizer, but not this project's training."""
    from megatron_dion.megatron import checkpoints

    checkpoints.use = lambda choice, args, options: None
    return argv


def test_optimizer_guards_itself(dion: Path, tmp_path: Path) -> None:
    argv = [*COMMON, *DION, *TP2.split(), *load(dion, tmp_path)]
    run_argv(4, argv, 0, without_the_join)
    assert losses(tmp_path) == losses(dion / "run")[4:]
    said = run_argv(4, [*argv, *LION.split()], 2, without_the_join)
    assert "of another run: --dion-scalar-optimizer adam (saved), lion (here)" in said
