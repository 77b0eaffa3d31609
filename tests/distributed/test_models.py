"""Kinds of models, each in one process and on a grid of ranks.

What goes where, losses, and weights against the dense float64 reference.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.nursery import DION, TRAINING, Nursery, losses
from tests.distributed.recording import (
    check_against_reference,
    rates_of_all,
    save_start,
    train_recorded,
)

ITERATIONS = 10
MODEL = (
    "--num-layers 2 --hidden-size 72 --ffn-hidden-size 200 --num-attention-heads 6"
    " --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope"
    " --normalization RMSNorm --swiglu --disable-bias-linear --init-method-std 0.05"
    " --attention-dropout 0 --hidden-dropout 0"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 250"
    " --make-vocab-size-divisible-by 8 --padded-vocab-size 256"
)
UNTIED = "--untie-embeddings-and-output-weights"
GROUPS2 = "--group-query-attention --num-query-groups 2 --kv-channels 12"
GROUPS3 = "--group-query-attention --num-query-groups 3 --kv-channels 12"
LATENT = (
    "--multi-latent-attention --kv-lora-rank 24"
    " --qk-head-dim 10 --qk-pos-emb-head-dim 4 --v-head-dim 8"
)
# Every expert sees every token: a choice between experts would turn rounding into other routes.
EXPERTS = (
    "--num-experts 4 --moe-router-topk 4 --moe-ffn-hidden-size 40"
    " --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall"
    " --moe-shared-expert-intermediate-size 48"
)
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
TP2_DP2 = (4, TP2)
TP2_PP2 = (4, f"{TP2} {PP2}")
PP2_DP2 = (4, f"{PP2} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000")
EP2_TP2 = (4, f"{TP2} --expert-model-parallel-size 2")

# Flags, the grid, and some of Dion's matrices in layer 0 with rows and columns.
Case = tuple[str, tuple[int, str], dict[str, str]]
CASES: dict[str, Case] = {
    "latent-attention": (
        f"{UNTIED} {LATENT} --q-lora-rank 20",
        PP2_DP2,
        {
            "linear_q_down_proj.weight": "20x72",
            "linear_q_up_proj.weight": "84x20",
            "linear_kv_down_proj.weight[latent]": "24x72",
            "linear_kv_down_proj.weight[rope_key]": "4x72",
            "linear_kv_up_proj.weight[key]": "60x24",
            "linear_kv_up_proj.weight[value]": "48x24",
        },
    ),
    "shared-experts-gated-attention": (
        f"{UNTIED} {GROUPS2} --attention-output-gate {EXPERTS} --moe-shared-expert-gate",
        EP2_TP2,
        {
            "linear_qkv.weight[gate]": "72x72",
            "linear_qkv.weight[key]": "24x72",
            "mlp.shared_experts.linear_fc1.weight[up]": "48x72",
            "mlp.experts.local_experts.3.linear_fc1.weight[gate]": "40x72",
        },
    ),
    "heads": (
        f"{UNTIED} {GROUPS2} --attention-output-gate --dion-split gate,heads",
        TP2_PP2,
        {"linear_qkv.weight[gate.2.1]": "12x72", "linear_qkv.weight[key.1]": "12x72"},
    ),
    "tied-embeddings": (GROUPS3, PP2_DP2, {"linear_qkv.weight[query]": "72x72"}),
    "several-tokens": (
        f"{UNTIED} {GROUPS2} --mtp-num-layers 2",
        TP2_PP2,
        {"mtp.layers.1.eh_proj.weight": "72x144"},
    ),
}
# Matrices that stay with the scalar optimizer, if the model has them.
REASONS = {
    "embedding.word_embeddings.weight": "embedding or output layer",
    "output_layer.weight": "embedding or output layer",
    "mlp.router.weight": "router of experts",
    "mlp.shared_experts.gate_weight": "gate of shared experts",
}
SINGLE = (1, "--micro-batch-size 12")
Result = tuple[list[float], str, list[dict[str, Any]]]


class Runs:
    """Runs models from starting points that their topologies share."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self._nursery = nursery
        self._folder = folder

    def run(self, flags: str, grid: tuple[int, str], start: str = "") -> Result:
        """Losses, the routing table, and what each rank recorded."""
        size, grid_flags = grid
        run_dir = self._folder / str(len(list(self._folder.iterdir())))
        argv = [*MODEL.split(), *TRAINING, *DION, *flags.split(), *grid_flags.split()]
        argv += ["--train-iters", str(ITERATIONS), "--run-dir", str(run_dir)]
        if start:
            argv += ["--load", str(self._folder / start), "--finetune"]
        records = self._nursery.run(size, train_without_latent_check, argv)
        return losses(run_dir), (run_dir / "routing.tsv").read_text(), records

    def both(self, name: str) -> tuple[Result, Result]:
        """A case in one process and on its grid."""
        flags, grid, _ = CASES[name]
        model = [*MODEL.split(), *flags.split("--dion-split")[0].split()]
        save_start(self._nursery, model, self._folder / name)
        return self.run(flags, SINGLE, start=name), self.run(flags, grid, start=name)


def train_without_latent_check(argv: Sequence[str]) -> dict[str, Any]:
    """On a rank: trains even where Megatron is known to lose gradients; Dion is given the rest."""
    from megatron_dion.megatron import validation

    refused = validation.check_latent_attention
    validation.OF_ALL_SCRIPTS = tuple(c for c in validation.OF_ALL_SCRIPTS if c != refused)
    return train_recorded(argv, ITERATIONS)


@pytest.fixture(scope="module")
def runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(nursery, tmp_path_factory.mktemp("models"))


def rows_of(routing: str) -> list[dict[str, str]]:
    header, *lines = [line.split("\t") for line in routing.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def check_that_nothing_is_silent(routing: str) -> None:
    """Every 2-D parameter is Dion's, or is named with the reason that its kind has."""
    for row in rows_of(routing):
        if row["shape"].count("x") == 1 and row["optimizer"] != "dion":
            [reason] = [why for name, why in REASONS.items() if row["parameter"].endswith(name)]
            assert row["reason"] == reason


@pytest.mark.parametrize("name", CASES)
def test_model_does_not_depend_on_topology(runs: Runs, name: str) -> None:
    (expected, routing, single), (found, grid_routing, grid) = runs.both(name)
    assert grid_routing == routing
    check_that_nothing_is_silent(routing)
    sizes = {row["matrix"]: f"{row['rows']}x{row['columns']}" for row in rows_of(routing)}
    for matrix, size in CASES[name][2].items():
        names = [name for name in sizes if name.endswith(matrix)]
        [first] = [name for name in names if not name.startswith("decoder.layers.1.")]
        assert sizes[first] == size
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    assert max(differences) < 2e-5, differences
    assert expected[-1] < expected[0] - 0.2
    check_against_reference(single, 1e-5)
    check_against_reference(grid, 1e-5)


def test_tensor_parallel_latent_attention_by_heads(runs: Runs) -> None:
    # The losses cannot agree: megatron loses gradients here (validation.check_latent_attention).
    flags = f"{UNTIED} {LATENT} --dion-split gate,heads"
    _, routing, records = runs.run(flags, TP2_DP2)
    check_against_reference(records, 1e-5)
    assert runs.run(flags, SINGLE)[1] == routing
    sizes = {row["matrix"]: (row["rows"], row["columns"]) for row in rows_of(routing)}
    start = "decoder.layers.0.self_attention.linear"
    assert sizes[f"{start}_q_proj.weight[query.5]"] == ("14", "72")
    assert sizes[f"{start}_kv_down_proj.weight[rope_key]"] == ("4", "72")
    assert sizes[f"{start}_kv_up_proj.weight[key.0]"] == ("10", "24")
    assert sizes[f"{start}_kv_up_proj.weight[value.5]"] == ("8", "24")


def train_with_overrides(argv: Sequence[str]) -> dict[str, Any]:
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


def test_overrides_and_patterns_by_name(nursery: Nursery, tmp_path: Path) -> None:
    argv = [*MODEL.split(), *TRAINING, *DION, *f"{UNTIED} {GROUPS3}".split()]
    argv += "--decoupled-lr 2e-3 --decoupled-min-lr 2e-3".split()
    argv += ["--dion-include", "output_layer.*", "--dion-exclude", "*layers.0.*.linear_proj.weight"]
    argv += ["--train-iters", str(ITERATIONS), "--run-dir", str(tmp_path)]
    records = nursery.run(2, train_with_overrides, argv)
    rates = rates_of_all(records, ITERATIONS - 1)
    assert rates["decoder.layers.0.mlp.linear_fc2.weight"] == (1e-3, 0.0)
    assert rates["output_layer.weight"] == (2e-3, 0.1)
    lr, weight_decay = rates["decoder.layers.1.mlp.linear_fc2.weight"]
    assert 2e-3 < lr < 4e-3
    assert weight_decay == 0.1
    check_against_reference(records, 1e-5)
    routing = (tmp_path / "routing.tsv").read_text()
    routes = {row["parameter"]: (row["optimizer"], row["reason"]) for row in rows_of(routing)}
    assert routes["output_layer.weight"] == ("dion", "included by output_layer.*")
    excluded = ("adam", "excluded by *layers.0.*.linear_proj.weight")
    assert routes["decoder.layers.0.self_attention.linear_proj.weight"] == excluded
    assert "decoder.layers.0.self_attention.linear_proj.weight" not in rates
