"""Row patterns of fused weights, against the way in which Megatron's forward pass slices them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.optimizer.fused import split_weight
from megatron_dion.sharding import Weight
from tests.distributed.nursery import Nursery

COLUMNS = 3
HEADS = 6
QKV = frozenset({"qkv", "gate"})
BY_HEAD = frozenset({"heads", "gate"})


def config(**changes: Any) -> Any:
    """The fields of a TransformerConfig that say how rows are laid out."""
    values = {
        "num_attention_heads": HEADS,
        "num_query_groups": 3,
        "kv_channels": 5,
        "attention_output_gate": False,
        "gated_linear_unit": True,
        "moe_mlp_glu_interleave_size": None,
        "qk_head_dim": 10,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "kv_lora_rank": 22,
    }
    return SimpleNamespace(**values | changes)


def whole(rows: int) -> Tensor:
    """A weight (rows, COLUMNS) in which every element differs."""
    return torch.arange(rows * COLUMNS).view(rows, COLUMNS)


def logical_matrices(
    name: str,
    weight: Tensor,
    layer: Any,
    split: frozenset[str],
    ranks: int = 1,
    is_grouped: bool = False,
) -> dict[str, Tensor]:
    """The matrices that the segments of all ranks make of a weight, by the name of their part."""
    rows = len(weight) // ranks
    described = split_weight(Weight(name, rows, COLUMNS, 0, ranks), layer, split, is_grouped)
    matrices = described.matrices(DionConfig())
    made = [torch.full((m.rows, m.columns), -1) for m in matrices]
    for rank in range(ranks):
        local = weight[rank * rows : (rank + 1) * rows]
        for s in described.segments(rank):
            rows_of_matrix = slice(s.matrix_row, s.matrix_row + s.rows)
            made[s.part][rows_of_matrix] = local[s.local_row : s.local_row + s.rows]
    return {
        m.name.removeprefix(name).strip("[]"): matrix
        for m, matrix in zip(matrices, made, strict=True)
    }


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, matrix in expected.items():
        assert torch.equal(found[name], matrix.reshape(-1, COLUMNS)), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_query_key_value(gated: bool, ranks: int) -> None:
    layer = config(attention_output_gate=gated, kv_channels=8)
    per_group = [16, *([16] if gated else []), 8, 8]
    weight = whole(3 * sum(per_group))
    names = ["query", *(["gate"] if gated else []), "key", "value"]
    # attention.py: view as (groups, rows of a group), then split.
    pieces = weight.view(3, -1, COLUMNS).split(per_group, dim=1)
    found = logical_matrices("a.linear_qkv.weight", weight, layer, QKV, ranks)
    check(found, dict(zip(names, pieces, strict=True)))


def test_query_key_value_by_heads() -> None:
    layer = config(attention_output_gate=True)
    weight = whole(3 * 6 * 5)
    names = ["query.0", "query.1", "gate.0", "gate.1", "key", "value"]
    heads = weight.view(3, 6, 5, COLUMNS)
    expected = {f"{n}.{group}": heads[group, i] for group in range(3) for i, n in enumerate(names)}
    check(logical_matrices("a.linear_qkv.weight", weight, layer, BY_HEAD), expected)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_latent_key_value_up(ranks: int) -> None:
    weight = whole(HEADS * 18)
    key, value = weight.view(HEADS, 18, COLUMNS).split([10, 8], dim=1)
    found = logical_matrices("a.linear_kv_up_proj.weight", weight, config(), QKV, ranks)
    check(found, {"key": key, "value": value})
    by_head = {f"key.{i}": key[i] for i in range(HEADS)}
    by_head |= {f"value.{i}": value[i] for i in range(HEADS)}
    found = logical_matrices("a.linear_kv_up_proj.weight", weight, config(), BY_HEAD, ranks)
    check(found, by_head)


@pytest.mark.parametrize("split", [QKV, BY_HEAD])
@pytest.mark.parametrize("ranks", [1, 2])
def test_latent_key_value_down(split: frozenset[str], ranks: int) -> None:
    weight = whole(26)
    latent, rope_key = weight.split([22, 4])
    found = logical_matrices("a.linear_kv_down_proj.weight", weight, config(), split, ranks)
    check(found, {"latent": latent, "rope_key": rope_key})


def test_latent_key_value_down_without_rotary_rows() -> None:
    layer = config(qk_pos_emb_head_dim=0)
    found = logical_matrices("a.linear_kv_down_proj.weight", whole(22), layer, QKV)
    check(found, {"latent": whole(22)})


@pytest.mark.parametrize("name", ["a.linear_q_proj.weight", "a.linear_q_up_proj.weight"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_latent_query(name: str, ranks: int) -> None:
    weight = whole(HEADS * 14)
    check(logical_matrices(name, weight, config(), QKV, ranks), {"": weight})
    heads = weight.view(HEADS, 14, COLUMNS)
    expected = {f"query.{i}": heads[i] for i in range(HEADS)}
    check(logical_matrices(name, weight, config(), BY_HEAD, ranks), expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_gate_and_up(ranks: int) -> None:
    weight = whole(24)
    gate, up = weight.view(ranks, 2, -1, COLUMNS).unbind(1)  # torch.chunk on each rank
    found = logical_matrices("a.linear_fc1.weight", weight, config(), QKV, ranks)
    check(found, {"gate": gate, "up": up})


def without_interleaving(weight: Tensor, block: int) -> Tensor:
    """In a process with Megatron: what it does to activations; their last dimension is the rows."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    return TEGroupedMLP._remove_glu_interleaving(weight.T, block).T


@pytest.mark.parametrize("ranks", [1, 2])
def test_interleaved_gate_and_up_of_grouped_experts(nursery: Nursery, ranks: int) -> None:
    layer, weight, name = config(moe_mlp_glu_interleave_size=3), whole(24), "a.linear_fc1.weight"
    found = logical_matrices(name, weight, layer, QKV, ranks, is_grouped=True)
    of_ranks = [nursery.run(1, without_interleaving, w, 3)[0] for w in weight.chunk(ranks)]
    gates, ups = zip(*(of_rank.chunk(2) for of_rank in of_ranks), strict=True)
    check(found, {"gate": torch.cat(gates), "up": torch.cat(ups)})
    sequential = {"gate": weight[:12], "up": weight[12:]}
    check(logical_matrices(name, weight, layer, QKV), sequential)


@pytest.mark.parametrize("name", ["a.linear_qkv.weight", "a.linear_fc1.weight", "weight"])
def test_nothing_is_split_unasked(name: str) -> None:
    check(logical_matrices(name, whole(30), config(), frozenset()), {"": whole(30)})


@pytest.mark.parametrize("split", [QKV, BY_HEAD])
@pytest.mark.parametrize("layer", ["linear_fc2", "linear_proj"])
def test_other_layers_are_one_matrix(layer: str, split: frozenset[str]) -> None:
    check(logical_matrices(f"a.{layer}.weight", whole(30), config(), split), {"": whole(30)})


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gate_and_up_in_one_matrix_have_the_order_of_one_rank(ranks: int) -> None:
    gate_and_up = whole(24).view(2, ranks, -1, COLUMNS)
    weight = gate_and_up.transpose(0, 1).reshape(24, COLUMNS)  # each rank's gate above its up
    found = logical_matrices("a.linear_fc1.weight", weight, config(), frozenset({"qkv"}), ranks)
    check(found, {"": whole(24)})
