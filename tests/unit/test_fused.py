"""Logical matrices of fused weights, against the way in which Megatron slices them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dion import DionConfig
from megatron_dion.optimizer.fused import split_weight
from megatron_dion.sharding.matrices import Weight
from tests.worlds import world

COLUMNS = 3
HEADS, GROUPS = 6, 3
QKV, BY_HEAD, NONE = frozenset({"qkv", "gate"}), frozenset({"heads", "gate"}), frozenset[str]()


def config(**changes: Any) -> Any:
    """The fields of a TransformerConfig that say how rows are laid out."""
    values = {
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "kv_channels": 4,
        "attention_output_gate": False,
        "gated_linear_unit": True,
        "moe_mlp_glu_interleave_size": None,
        "qk_head_dim": 10,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "kv_lora_rank": 20,
    }
    return SimpleNamespace(**values | changes)


def whole(rows: int) -> Tensor:
    """A weight (rows, COLUMNS) in which every element differs."""
    return torch.arange(rows * COLUMNS).view(rows, COLUMNS)


def check(
    expected: dict[str, Tensor],
    layer: str,
    weight: Tensor,
    split: frozenset[str],
    ranks: int = 1,
    is_grouped: bool = False,
    **changes: Any,
) -> None:
    """Compares matrices with those that the segments of all ranks make of a weight."""
    rows, name = len(weight) // ranks, f"a.{layer}.weight"
    one = Weight(name, rows, COLUMNS, 0, ranks)
    described = split_weight(one, config(**changes), split, is_grouped)
    matrices = described.matrices(DionConfig())
    made = [torch.full((m.rows, m.columns), -1) for m in matrices]
    for rank in range(ranks):
        local = weight[rank * rows : (rank + 1) * rows]
        for s in described.segments(rank):
            rows_of_matrix = slice(s.matrix_row, s.matrix_row + s.rows)
            made[s.part][rows_of_matrix] = local[s.local_row : s.local_row + s.rows]
    found = {m.name.removeprefix(name).strip("[]"): made[i] for i, m in enumerate(matrices)}
    assert found.keys() == expected.keys()
    for part, matrix in expected.items():
        assert torch.equal(found[part], matrix.reshape(-1, COLUMNS)), part


def in_periods(periods: int, **rows: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """As attention.py and multi_latent_attention.py do: view as (periods, rows), then split."""

    def split(weight: Tensor) -> dict[str, Tensor]:
        pieces = weight.view(periods, -1, COLUMNS).split(list(rows.values()), dim=1)
        return dict(zip(rows, pieces, strict=True))

    return split


def by_head(periods: int, *names: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """All of equal size, and each in each period another matrix."""

    def split(weight: Tensor) -> dict[str, Tensor]:
        heads = weight.view(periods, len(names), -1, COLUMNS)
        return {f"{n}.{p}": heads[p, i] for p in range(periods) for i, n in enumerate(names)}

    return split


def one_matrix(weight: Tensor) -> dict[str, Tensor]:
    return {"": weight}


GATED = {"attention_output_gate": True}
HALVES = ("query.0", "query.1", "gate.0", "gate.1")
CASES: list[tuple[str, int, frozenset[str], dict[str, Any], Any]] = [
    ("linear_qkv", 48, QKV, {}, in_periods(GROUPS, query=8, key=4, value=4)),
    ("linear_qkv", 72, QKV, GATED, in_periods(GROUPS, query=8, gate=8, key=4, value=4)),
    ("linear_qkv", 48, BY_HEAD, {}, by_head(GROUPS, "query.0", "query.1", "key", "value")),
    ("linear_qkv", 72, BY_HEAD, GATED, by_head(GROUPS, *HALVES, "key", "value")),
    ("linear_kv_up_proj", 108, QKV, {}, in_periods(HEADS, key=10, value=8)),
    ("linear_kv_up_proj", 96, BY_HEAD, {"qk_head_dim": 8}, by_head(HEADS, "key", "value")),
    ("linear_kv_down_proj", 24, QKV, {}, in_periods(1, latent=20, rope_key=4)),
    ("linear_kv_down_proj", 24, BY_HEAD, {}, in_periods(1, latent=20, rope_key=4)),
    ("linear_kv_down_proj", 20, QKV, {"qk_pos_emb_head_dim": 0}, in_periods(1, latent=20)),
    ("linear_q_up_proj", 84, BY_HEAD, {}, by_head(HEADS, "query")),
    ("linear_fc1", 24, QKV, {"gated_linear_unit": False}, one_matrix),
    *((layer, 24, BY_HEAD, {}, one_matrix) for layer in ("linear_fc2", "linear_proj")),
    ("linear_qkv", 48, NONE, {}, one_matrix),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("layer", "rows", "split", "changes", "sliced"), CASES)
def test_matrices_are_what_megatron_slices(
    layer: str, rows: int, split: frozenset[str], changes: dict[str, Any], sliced: Any, ranks: int
) -> None:
    """Whole weights, cut over tensor-parallel ranks at any row."""
    check(sliced(whole(rows)), layer, whole(rows), split, ranks, **changes)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gate_and_up(ranks: int) -> None:
    """Split, or in one matrix in an order of rows that is the same for all numbers of ranks."""
    weight = whole(24)
    gate, up = weight.view(ranks, 2, -1, COLUMNS).unbind(1)  # torch.chunk on each rank
    check({"gate": gate, "up": up}, "linear_fc1", weight, QKV, ranks)
    check({"": torch.cat([gate, up])}, "linear_fc1", weight, NONE, ranks)


def without_interleaving(weight: Tensor, block: int) -> Tensor:
    """In a process with Megatron: what it does to activations; their last dimension is the rows."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    return TEGroupedMLP._remove_glu_interleaving(weight.T, block).T


@pytest.mark.parametrize("ranks", [1, 2])
def test_interleaved_gate_and_up_of_grouped_experts(ranks: int) -> None:
    weight = whole(24)
    interleaved: dict[str, Any] = {"moe_mlp_glu_interleave_size": 3}
    of_ranks = [world(1).fork(without_interleaving, w, 3)[0] for w in weight.chunk(ranks)]
    gates, ups = zip(*(of_rank.chunk(2) for of_rank in of_ranks), strict=True)
    expected = {"gate": torch.cat(gates), "up": torch.cat(ups)}
    check(expected, "linear_fc1", weight, QKV, ranks, is_grouped=True, **interleaved)
    sequential = {"gate": weight[:12], "up": weight[12:]}
    check(sequential, "linear_fc1", weight, QKV, **interleaved)
