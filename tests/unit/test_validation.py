"""What is refused before training, by the line that says so; and what is not."""

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dion.megatron import capabilities, launch, validation
from megatron_dion.megatron.data_checks import identity_of
from megatron_dion.megatron.errors import ConfigurationError
from tests.distributed.tiny_gpt import DION, MODEL, TRAINING
from tests.worlds import world

RUN = [*MODEL, *TRAINING, "--train-iters", "50"]
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise"

# What a run with Dion is refused for. The first column is added to a command line that is right.
MISTAKES = [
    ("--dion-rank-fraction 0", "--dion-rank-fraction must be in (0, 1], not 0.0"),
    ("--dion-scalar-lr-mult 0", "--dion-scalar-lr-mult must be positive and finite, not 0.0"),
    ("--dion-comm-dtype fp16", "--dion-comm-dtype: invalid choice: 'fp16'"),
    ("--dion-split qkv,head", "--dion-split must be of qkv, gate, heads, not ['head', 'qkv']"),
    ("--dion-orthonormalizer rcqr", "--dion-orthonormalizer was removed: "),
    ("--dion-oversample 1.5", "--dion-oversample was removed: "),
    ("--dion-right-factor orth", "--dion-right-factor was removed: "),
    ("--fp8-emulation", "--fp8-emulation was removed: "),
    ("--optimizer adam --dion-momentum 0.9", "--dion-momentum 0.9 has no effect with --optimizer"),
    ("--use-torch-fsdp2", "--use-torch-fsdp2"),
    ("--qk-clip", "--optimizer dion does not go with --qk-clip: Megatron takes a rank's piece"),
    ("--qk-clip --optimizer adam", "--use-distributed-optimizer does not go with --qk-clip: "),
    ("--rampup-batch-size 3 3 99", "ignores --rampup-batch-size 3 3 99: use --step-batch-size-s"),
    ("--apply-residual-connection-post-layernorm", "ignores --apply-residual-connection-post-l"),
    ("--async-save --save x --save-interval 2", "ignores --async-save without --use-persistent-"),
    ("--async-save --use-persistent-ckpt-worker", "--use-persistent-ckpt-worker needs a GPU"),
    ("--moe-shared-expert-glu-interleave-size 8", "--moe-shared-expert-glu-interleave-size 8"),
    ("--experimental-attention-variant dsa", "--experimental-attention-variant dsa"),
    ("--non-persistent-ckpt-type global", "--non-persistent-ckpt-type global"),
    ("--ckpt-format torch", "--ckpt-format torch is not supported"),
    ("--no-ckpt-fully-parallel-save", "--no-ckpt-fully-parallel-save writes checkpoints"),
    ("--save x", "--save x needs --save-interval"),
    ("--save x --save-interval 0", "--save x needs --save-interval"),
    ("--dion-recenter-interval 5", "--dion-recenter-interval 5 needs --dion-compressed-sync"),
    ("--dion-recenter-interval 0", "--dion-recenter-interval must be at least 1, not 0"),
    ("--dion-log-interval 0", "--dion-log-interval must be at least 1, not 0"),
    ("--dion-log-interval 5", "--dion-log-interval 5 has nowhere to write: add --run-dir"),
    (FP8, "--fp8-format hybrid has no effect with --transformer-impl local"),
    (
        "--multi-latent-attention --tensor-model-parallel-size 2",
        "needs a CPU and --tensor-model-parallel-size 1, not 2",
    ),
    ("--lr-warmup-iters 20", "--lr-warmup-iters 20 leaves nothing of 20 iterations"),
    (
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        "--use-checkpoint-opt-param-scheduler the checkpoint's: leave one out",
    ),
    ("--eval-interval 0", "--eval-interval must be at least 1"),
    ("--log-interval 0", "--log-interval 0: it must be at least 1"),
    ("--tensorboard-log-interval 0", "--tensorboard-log-interval 0: it must be at least 1"),
    ("--optimizer muon", "--optimizer muon with --use-distributed-optimizer or --fp16: give it"),
    ("--dump-param-to-param-group-map x", "--dump-param-to-param-group-map x: its groups are"),
    ("--global-batch-size 10", "must be divisible by eval_micro_batch_size (3) * data_parallel"),
    ("--tensor-model-parallel-size 3", "not divisible by"),
    ("--sft", "--sft is not supported by pretrain_gpt.py"),
    ("--per-dataset-sequences-path x", "--per-dataset-sequences-path"),
]

RIGHT = [
    "",
    "--optimizer adam",
    "--optimizer muon --bf16",
    "--dion-split none --dion-include a.* b.* --dion-scalar-optimizer lion",
    "--num-distributed-optimizer-instances 2 --dion-compressed-sync --dion-recenter-interval 5",
    f"{FP8} --transformer-impl transformer_engine --bf16",
]


def refusals(lines: Sequence[Sequence[str]], world_size: int) -> list[str | None]:
    """On a rank: what each command line is refused with, if it is."""
    from megatron_dion.megatron.pretrain import check_arguments

    return [refusal_of(check_arguments, line, "cpu", world_size) for line in lines]


def refusal_of(check: Any, *args: Any) -> str | None:
    try:
        check(*args)
    except ConfigurationError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def said() -> dict[str, str | None]:
    """What is said of each of the command lines above."""
    lines = [*(flags for flags, _ in MISTAKES), *RIGHT]
    [answers] = world(1).fork(refusals, [[*RUN, *DION, *line.split()] for line in lines], 4)
    return dict(zip(lines, answers, strict=True))


@pytest.mark.parametrize(("flags", "named"), MISTAKES)
def test_mistakes_are_named_in_one_line(
    said: dict[str, str | None], flags: str, named: str
) -> None:
    assert named in str(said[flags])
    assert "\n" not in str(said[flags])


@pytest.mark.parametrize("flags", RIGHT)
def test_what_is_right_passes(said: dict[str, str | None], flags: str) -> None:
    assert said[flags] is None


WITHOUT = {
    "--use-distributed-optimizer": "--optimizer dion needs --use-distributed-optimizer",
    "--lr": "--lr is missing",
    "--train-iters": "--train-iters is missing",
    "--eval-interval": "--eval-interval must be at least 1",
}


def test_missing_flags_are_named() -> None:
    lines = []
    for flag in WITHOUT:
        words = [*RUN, *DION]
        at = words.index(flag)
        del words[at : at + (1 if flag.startswith("--use") else 2)]
        lines.append(words)
    [said] = world(1).fork(refusals, lines, 1)
    assert [named in line for line, named in zip(said, WITHOUT.values(), strict=True)] == [True] * 4


def parsed(argv: Sequence[str]) -> dict[str, Any]:
    """On a rank: what the flags of Dion become, and what Megatron makes of the optimizer."""
    from megatron.training import arguments

    from megatron_dion.megatron.flags import dion_options, extend_parser
    from megatron_dion.megatron.hooks import validate_as_megatron

    sys.argv = ["pretrain_gpt.py", *argv]
    args = arguments.parse_args(lambda parser: extend_parser(parser, "cpu"))
    args.device = "cpu"
    args = validate_as_megatron(args, lambda: arguments.validate_args(args))
    options = dion_options(args)
    names = ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer")
    return {"options": options, **{name: getattr(args, name) for name in names}}


def test_flags_reach_dion() -> None:
    flags = "--dion-rank-fraction 0.5 --dion-momentum 0.9 --seed 7 --dion-split heads"
    [found] = world(1).fork(parsed, [*RUN, *DION, *flags.split(), "--dion-exclude", "a", "b*"])
    config = found["options"].config
    assert (config.rank_fraction, config.momentum, config.seed) == (0.5, 0.9, 7)
    rules = found["options"].rules
    assert (rules.split, rules.include, rules.exclude) == (frozenset({"heads"}), (), ("a", "b*"))
    assert found["use_distributed_optimizer"]
    assert not found["use_layer_wise_distributed_optimizer"]


@pytest.mark.parametrize("missing", ["package wandb", "--wandb-exp-name, and --wandb-save-dir"])
def test_curves_have_somewhere_to_go(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(validation, "find_spec", lambda name: missing != f"package {name}")
    names = dict.fromkeys(("save", "tensorboard_dir", "wandb_exp_name", "wandb_save_dir"), "")
    with pytest.raises(ConfigurationError, match=f"--wandb-project needs .*{missing}"):
        validation.check_packages(Namespace(**names, wandb_project="x"))


# --- data


def write_data(prefix: Path, documents: list[list[int]]) -> str:
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * 2])
    tokens = np.concatenate([np.array(document, dtype=np.uint16) for document in documents])
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(documents), len(documents) + 1)
    bounds = np.arange(len(documents) + 1, dtype=np.int64)
    index = header + lengths.tobytes() + offsets.astype(np.int64).tobytes() + bounds.tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_data(tmp_path / "data", [[1, 2, 3], [4, 240], [6, 7, 8, 9]])


def data_refusal(flags: Sequence[str]) -> str | None:
    """On a rank: what is said of a run's data."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import arguments

    from megatron_dion.megatron.data_checks import check_data, check_tokenizer
    from megatron_dion.megatron.flags import extend_parser

    sys.argv = ["pretrain_gpt.py", *flags]
    args = arguments.parse_args(lambda parser: extend_parser(parser, "cpu"))
    args.rank = 0
    return refusal_of(check_data, args) or refusal_of(check_tokenizer, args, build_tokenizer(args))


def said_of(flags: str) -> Any:
    tokenizer = "--tokenizer-type NullTokenizer --vocab-size 250"
    [line] = world(1).fork(data_refusal, [*tokenizer.split(), *flags.split()])
    return line


@pytest.mark.parametrize("split", ["67,33,0", "1,0,0"])
def test_whole_data_pass(prefix: str, split: str) -> None:
    assert said_of(f"--data-path {prefix} --split {split}") is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "no data: give --data-path"),
        ("--data-path nowhere", "the data nowhere cannot be read: One or both"),
        ("--data-args-path nowhere", "No such file or directory: 'nowhere'"),
        ("--mock-data --data-path a", "--mock-data does not go with the data a:"),
        ("--data-path 1 {} nan {}", "--data-path nan {0}: the weight must be positive and finite"),
        ("--valid-data-path 0 {} 1 {}", "--data-path 0 {0}: the weight must be positive"),
        ("--data-path {} --split 90,10,0", "--split 90,10,0 gives the validation set none of the"),
        ("--data-path {} --split 1,98,1", "--split 1,98,1 gives the"),
        ("--data-path {} --multiple-validation-sets", "-sets needs --full-validation, "),
        (
            "--train-data-path {0} --valid-data-path {0} {0} --test-data-path {0}"
            " --multiple-validation-sets --full-validation",
            "--multiple-validation-sets needs --full-validation, --valid-data-path with the sets",
        ),
        (
            "--train-data-path {0} --valid-data-path {0} {0} --multiple-validation-sets"
            " --full-validation --validation-set-names a a",
            "--validation-set-names a a: the 2 sets need a name each",
        ),
    ],
)
def test_runs_without_data_are_refused(prefix: str, flags: str, named: str) -> None:
    assert named.format(prefix) in said_of(flags.replace("{}", "{0}").format(prefix))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".idx", None), (".bin", None), (".idx", b""), (".idx", b"x" * 100), (".idx", -1),
     (".bin", -1), (".idx", 9), (".idx", 17)],
)  # fmt: skip
def test_damaged_data_are_refused(prefix: str, suffix: str, content: bytes | int | None) -> None:
    """A file is missing, is another, is cut off, or is of an unknown version or type of tokens."""
    path = Path(prefix + suffix)
    whole = path.read_bytes()
    match content:
        case None:
            path.unlink()
        case -1:
            path.write_bytes(whole[:-1])
        case int(position):
            path.write_bytes(whole[:position] + b"\x63" + whole[position + 1 :])
        case other:
            path.write_bytes(other)
    assert prefix in said_of(f"--data-path {prefix}")


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    prefix = write_data(tmp_path / "data", [[1, 250]])
    assert "hold the token 250" in said_of(f"--data-path {prefix}")


def a_tokenizer(**others: Any) -> Any:
    """One that splits into letters, of which it knows two."""
    facts = {"vocab_size": 250, "eod": 249, "inv_vocab": {0: "a", 1: "b"}, "tokenize": list}
    return Namespace(**facts | others)


def test_tokenizer_is_known_by_what_it_does() -> None:
    same = identity_of(a_tokenizer())
    assert identity_of(a_tokenizer(path="elsewhere", pad=7)) == same
    others = {"eod": 3, "vocab_size": 251, "inv_vocab": {0: "b", 1: "a"}, "tokenize": set}
    found = {identity_of(a_tokenizer(**{name: value})) for name, value in others.items()}
    assert len(found - {same}) == len(others)


def test_tokenizer_is_compared_with_what_was_noted(prefix: str) -> None:
    null = Namespace(vocab_size=250, eod=249)
    data, notes = f"--data-path {prefix}", Path(prefix + ".json")
    notes.write_text(json.dumps({"tokenizer": identity_of(null)}))
    assert said_of(data) is None
    assert f"is not the tokenizer that made the data {prefix}" in said_of(
        f"{data} --vocab-size 251"
    )
    said = said_of(f"{data} --null-tokenizer-eod-id -1 --eod-mask-loss")
    assert "--eod-mask-loss: --tokenizer-type NullTokenizer None has no end token" in said
    notes.write_text("[")
    assert f"{prefix}.json does not describe the data" in said_of(data)


# --- what must be true before megatron is imported


CHAIN = ("core/optimizer/optimizer.py", "class ChainedOptimizer(")
OF_CHAIN = (
    *("get_grad_norm", "prepare_grads", "step_with_ready_grads", "load_state_dict"),
    *("sharded_state_dict", "_step"),
)
STEP = ("training/training.py", "def train_step(")
GROUPS = ("core/process_groups_config.py", "")


@pytest.mark.versions
@pytest.mark.parametrize(
    ("place", "old", "new", "lacks"),
    [
        *((CHAIN, f"def {one}(", f"def do_{one}(", f"ChainedOptimizer.{one}") for one in OF_CHAIN),
        (STEP, " optimizer, ", " optim: 'optimizer', ", "train_step"),
        (STEP, " optimizer, ", "\n # one (global) step (see docs):\n optimizer, ", None),
        (STEP, "def train_step(", "def train_step[T](", None),
        (GROUPS, "expt_tp_pp_group", "expt_group", "expt_tp_pp_group"),
    ],
)
def test_megatron_core_is_judged_by_its_names(
    tmp_path: Path, place: tuple[str, str], old: str, new: str, lacks: str | None
) -> None:
    """A name that only another class, an annotation or a comment has is missing."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    installed = Path(str(spec.origin)).parents[1]
    assert list(capabilities.missing(installed)) == []
    for one in capabilities.NEEDED:
        (tmp_path / one).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / one, tmp_path / one)
    file, start = place
    text = (installed / file).read_text()
    at = text.index(start)
    assert old in text[at:]
    text = text[:at] + text[at:].replace(old, new, -1 if place == GROUPS else 1)
    (tmp_path / file).write_text(f"{text}\n# {old}\n")
    said = {re.sub(r"\(.*\)", "", one) for one in capabilities.missing(tmp_path)}
    assert said == ({f"{lacks} in megatron/{file}"} if lacks else set())


def test_an_untested_version_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capabilities, "TESTED", ())
    monkeypatch.setattr(launch.cpu, "install", lambda hide_gpus: None)
    assert launch.prepare(["--device", "cpu"]) == "cpu"
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[dion\] megatron-core [\d.]+ is not tested \(.*\)", line)


def train_without(name: str) -> str | None:
    """On a rank: what our own script says where Megatron's `argument_utils` lacks a function."""
    from megatron.training import argument_utils

    delattr(argument_utils, name)
    sys.modules.pop("megatron_dion.megatron.pretrain", None)
    return refusal_of(launch.train, ["--device", "cpu"])


def test_our_script_says_which_import_fails() -> None:
    [said] = world(1).fork(train_without, "gpt_config_from_args")
    assert said.startswith("pretrain_gpt.py, unlike a script of yours (docs/switching.md), needs")
    assert "another megatron-core (pip" in said
    assert "cannot import name 'gpt_config_from_args'" in said


def test_a_checkout_beside_a_script_is_found_and_not_imported(tmp_path: Path) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('must not be imported')")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 17\nPATCH = 1\n")
    code = "from megatron_dion.megatron import launch; launch.prepare([])"
    command = [sys.executable, "-c", code]
    paths = [str(tmp_path), *sys.path]
    found = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": os.pathsep.join(paths)}
    )
    said = f"megatron-core 0.17.1 in {tmp_path}/megatron has no is_managed_by_layer_wise_optimizer"
    assert said in found.stderr


def replaced_names() -> list[str]:
    """On a rank: what is rebound or overridden of megatron's; nobody would miss an old name."""
    from megatron_dion.megatron.patches import _OWNERS
    from megatron_dion.optimizer.chain import DionChainedOptimizer
    from megatron_dion.optimizer.distributed import DionDistributedOptimizer

    rebound = {f"{o.__name__}.{n}" if isclass(o) else n for n, o in _OWNERS.items()}
    overridden = {
        f"{next(base for base in one.__mro__[1:] if n in vars(base)).__name__}.{n}"
        for one in (DionChainedOptimizer, DionDistributedOptimizer)
        for n, value in vars(one).items()
        if isfunction(value) and n != "__init__" and hasattr(one.__base__, n)
    }
    return sorted(rebound | overridden)


def test_what_is_replaced_is_looked_for() -> None:
    [names] = world(1).fork(replaced_names)
    assert "ChainedOptimizer._step" in names
    entries = (entry for text in capabilities.NEEDED.values() for entry in text.split())
    needed = {name for entry in entries for name in entry.partition("(")[0].split("|")}
    assert set(names) - needed == set()
