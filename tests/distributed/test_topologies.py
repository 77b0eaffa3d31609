"""The same run on every grid of ranks, for all kinds of layers.

Each case trains in one process and on its grid from the same weights. Both have the same losses and
the same routing table, and the weights that the dense float64 reference makes of the gradients.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed.recording import (
    check_against_reference,
    rates_of_all,
    save_start,
    train_recorded,
)
from tests.distributed.tiny_gpt import DION, INSTANCES, OVERLAP, PP2, TP2, TRAINING, losses
from tests.worlds import world

ITERATIONS = 10
SAMPLES = 12
COMMON = (
    "--hidden-size 72 --ffn-hidden-size 200 --seq-length 16 --max-position-embeddings 16"
    " --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
    " --init-method-std 0.05 --attention-dropout 0 --hidden-dropout 0 --mock-data"
    " --tokenizer-type NullTokenizer --vocab-size 250 --make-vocab-size-divisible-by 8"
    " --padded-vocab-size 256"
)
UNTIED = "--untie-embeddings-and-output-weights"
TIED = "--num-layers 2 --num-attention-heads 8 --group-query-attention --num-query-groups 4"
TIED += " --kv-channels 10"
DENSE = f"{UNTIED} {TIED}"
# Every expert sees every token: a choice between experts would turn rounding into other routes.
EXPERTS = (
    f"{DENSE} --num-experts 4 --moe-router-topk 4 --moe-ffn-hidden-size 40"
    " --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall"
)
MODELS = {
    "dense": DENSE,
    "tied": TIED,
    "layers4": DENSE.replace("--num-layers 2", "--num-layers 4"),
    "latent": (
        f"{UNTIED} --num-layers 2 --num-attention-heads 6 --multi-latent-attention"
        " --kv-lora-rank 24 --q-lora-rank 20 --qk-head-dim 10 --qk-pos-emb-head-dim 4"
        " --v-head-dim 8"
    ),
    "experts": (
        f"{EXPERTS} --moe-shared-expert-intermediate-size 48 --moe-shared-expert-gate"
        " --attention-output-gate"
    ),
    "small-experts": EXPERTS.replace("hidden-size 40", "hidden-size 8"),
    "gated": f"{DENSE} --attention-output-gate",
    "several-tokens": f"{DENSE} --mtp-num-layers 2",
}
# Kinds of parts of fused weights that are matrices; tests/unit/test_fused.py has their rows.
ATTENTION = {"latent": {"latent", "rope_key", "key", "value"}}
# Why matrices stay with the scalar optimizer.
REASONS = {"embedding or output layer", "router of experts", "gate of shared experts"}
# Flags of Dion, and what they are in the reference's hyperparameters.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "": ("", {}),
    "heads": ("--dion-split gate,heads", {}),
    "whole": ("--dion-split none", {}),
    "full-rank": ("--dion-rank-fraction 1", {"rank_fraction": 1.0}),
    "rank1": ("--dion-rank-fraction 0.01", {"rank_fraction": 0.01}),
    "lion": ("--dion-scalar-optimizer lion --dion-scalar-lr-mult 0.1", {}),
    "paper": ("--dion-residual none", {"residual": "none"}),
}
# The first P of an output projection has a condition number of 7e5: two passes leave 7.5e-5.
REFERENCE_TOLERANCE = {"full-rank": {"linear_proj": 1.5e-4}}
PRECISION = {
    "fp32": "",
    "bf16": "--bf16",
    "fp16": "--fp16 --initial-loss-scale 4096 --loss-scale-window 4",
}
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-3, "fp16": 5e-3}

TP4 = "--tensor-model-parallel-size 4"
EP2 = "--expert-model-parallel-size 2"
VPP2 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"


class Case(NamedTuple):
    """A model on a grid; with `micro`, the samples of a rank at a time."""

    model: str
    ranks: int
    flags: str
    micro: int
    precision: str = "fp32"
    option: str = ""


CASES = {
    "dp3": Case("dense", 3, "", 2),
    "tp4": Case("dense", 4, TP4, 12),
    "tp2-dp2": Case("dense", 4, f"{TP2} {OVERLAP}", 6),
    "cp2-dp2": Case("dense", 4, f"--context-parallel-size 2 {OVERLAP}", 6),
    "instances2-tp2": Case("dense", 4, f"{TP2} {INSTANCES} {OVERLAP}", 6),
    "tp2-pp2-dp2": Case("dense", 8, f"{TP2} {PP2}", 6),
    "vpp2-dp2": Case("layers4", 4, f"{VPP2} {OVERLAP}", 3),
    "latent-pp2-dp2": Case("latent", 4, f"{PP2} {OVERLAP}", 3),
    "ep2-tp2-etp1": Case("experts", 4, f"{TP2} {EP2} --expert-tensor-parallel-size 1", 6),
    "ep2-tp2-etp2": Case("experts", 4, f"{TP2} {EP2} --expert-tensor-parallel-size 2", 6),
    "heads-tp2-pp2": Case("gated", 4, f"{TP2} {PP2}", 6, option="heads"),
    "bf16-tp2-pp2": Case("dense", 4, f"{TP2} {PP2} {OVERLAP}", 6, "bf16"),
    "overlap-paper-tp2-pp2-dp2": Case("dense", 8, f"{TP2} {PP2} {OVERLAP}", 6, option="paper"),
}
SLOW_CASES = {
    "dp4": Case("dense", 4, OVERLAP, 3),
    "tp2-dp4": Case("dense", 8, "--tensor-model-parallel-size 2", 3),
    "tp4-dp2": Case("dense", 8, f"{TP4} --sequence-parallel", 6),
    "instances2-dp4": Case("dense", 4, INSTANCES, 3),
    "ep2": Case("experts", 2, EP2, 6),
    "ep2-dp4-small": Case("small-experts", 4, f"{EP2} {OVERLAP}", 3),
    "tied-pp2-dp2": Case("tied", 4, f"{PP2} {OVERLAP}", 3),
    "several-tokens-tp2-pp2": Case("several-tokens", 4, f"{TP2} {PP2}", 6),
    "bf16-dp4": Case("dense", 4, OVERLAP, 3, "bf16"),
    "fp16-tp2-dp2": Case("dense", 4, f"{TP2} {OVERLAP}", 6, "fp16"),
    **{
        f"{option}-tp2-dp2": Case("dense", 4, f"{TP2} {OVERLAP}", 6, option=option)
        for option in ("whole", "full-rank", "rank1", "lion")
    },
}
SLOW_CASES |= {
    f"paper-{name}": case._replace(option="paper")
    for name, case in (CASES | SLOW_CASES).items()
    if not case.option
}
assert not CASES.keys() & SLOW_CASES.keys()
Result = tuple[list[float], str, list[dict[str, Any]]]


class Runs:
    """Runs models from starting points that all their grids share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start = cache(self._save_start)
        self.single = cache(self._single)

    def run(self, case: Case, flags: str = "") -> Result:
        """Losses, the routing table, and what each rank recorded."""
        run_dir = self._folder / f"run-{len(list(self._folder.iterdir()))}"
        argv = f"{COMMON} {MODELS[case.model]} {case.flags} {PRECISION[case.precision]}".split()
        argv += [*TRAINING, *DION, *OPTIONS[case.option][0].split(), *flags.split()]
        argv += ["--micro-batch-size", str(case.micro), "--train-iters", str(ITERATIONS)]
        argv += ["--load", str(self._start(case.model)), "--finetune", "--run-dir", str(run_dir)]
        records = world(case.ranks).fork(train_recorded, argv, ITERATIONS)
        return losses(run_dir), (run_dir / "routing.tsv").read_text(), records

    def _save_start(self, model: str) -> Path:
        """Pipeline stages would draw other first weights."""
        folder = self._folder / model
        save_start(f"{COMMON} {MODELS[model]}".split(), folder)
        return folder

    def _single(self, model: str, precision: str, option: str) -> Result:
        """A run in one process, which has to be right, and to learn."""
        result = self.run(Case(model, 1, "", SAMPLES, precision, option))
        check_records(result, option)
        assert result[0][-1] < result[0][0] - 0.2
        rows = rows_of(result[1])
        others = [row for row in rows if "x" in row["shape"] and row["optimizer"] != "dion"]
        assert {row["reason"] for row in others} <= REASONS
        return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("topologies"))


def check_records(result: Result, option: str) -> None:
    loose = REFERENCE_TOLERANCE.get(option, {})
    check_against_reference(result[2], loose, **OPTIONS[option][1])


def rows_of(routing: str) -> list[dict[str, str]]:
    header, *lines = [line.split("\t") for line in routing.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_run_does_not_depend_on_topology(runs: Runs, name: str) -> None:
    case = (CASES | SLOW_CASES)[name]
    expected, routing, _ = runs.single(case.model, case.precision, case.option)
    on_grid = runs.run(case)
    assert largest_difference(on_grid[0], expected) < TOLERANCE[case.precision]
    assert on_grid[1] == routing
    check_records(on_grid, case.option)
    parts = set(re.findall(r"\[([a-z_]+)", routing))
    expected_parts = {"gate", "up"} | ATTENTION.get(case.model, {"query", "key", "value"})
    assert parts == (set() if case.option == "whole" else expected_parts)


def test_storage_and_exchange_in_bf16_stay_close(runs: Runs) -> None:
    names = ("comm", "momentum", "factor")
    flags = " ".join(f"--dion-{name}-dtype bf16" for name in names)
    in_bf16, _, _ = runs.run(CASES["tp2-dp2"], flags)
    expected, _, _ = runs.single("dense", "fp32", "")
    assert 2e-5 < largest_difference(in_bf16, expected) < 1e-2


def train_with_overrides(argv: list[str]) -> list[Any]:
    """On a rank: one weight has rates of its own, by Megatron's overrides of parameter groups."""
    from megatron.core.optimizer.optimizer_config import ParamKey
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride
    from megatron.training import training

    standard = training.get_standard_config_overrides

    def overrides(config: Any) -> Any:
        rates = ParamGroupOverride(max_lr=1e-3, min_lr=1e-3, wd_mult=0.0)
        return {**standard(config=config), ParamKey(name="*layers.0.mlp.linear_fc2.weight"): rates}

    training.get_standard_config_overrides = overrides
    return train_recorded(argv, ITERATIONS)


def test_overrides_and_patterns_by_name(tmp_path: Path) -> None:
    argv = [*f"{COMMON} {DENSE}".split(), *TRAINING, *DION]
    argv += "--decoupled-lr 2e-3 --decoupled-min-lr 2e-3".split()
    argv += ["--dion-include", "output_layer.*", "--dion-exclude", "*layers.0.*.linear_proj.weight"]
    argv += ["--train-iters", str(ITERATIONS), "--run-dir", str(tmp_path)]
    records = world(2).fork(train_with_overrides, argv)
    rates = rates_of_all(records, ITERATIONS - 1)
    assert rates["decoder.layers.0.mlp.linear_fc2.weight"] == (1e-3, 0.0)
    assert rates["output_layer.weight"] == (2e-3, 0.1)
    lr, weight_decay = rates["decoder.layers.1.mlp.linear_fc2.weight"]
    assert 2e-3 < lr < 4e-3
    assert weight_decay == 0.1
    check_against_reference(records)
    assert "decoder.layers.0.self_attention.linear_proj.weight" not in rates
