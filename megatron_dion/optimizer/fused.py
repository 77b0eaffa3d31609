"""What the rows of a fused weight are, by the name of its linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dion.sharding import Part

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class RowPattern:
    """One period of the rows of a weight, as `megatron_dion.sharding.Weight` takes it.

    Attributes:
        parts: the rows by logical matrix; empty for a weight that is one matrix.
        separate_periods: whether a part is another matrix in each period.
        joined: whether all parts are one matrix.
    """

    parts: tuple[Part, ...] = ()
    separate_periods: bool = False
    joined: bool = False


def row_pattern(
    name: str,
    rows: int,
    config: TransformerConfig,
    split: frozenset[str],
    is_grouped: bool = False,
) -> RowPattern:
    """The pattern of a weight.

    Args:
        name: global name of the parameter.
        rows: of a rank's parameter.
        config: of the layer.
        split: which fusions are split, as in `RoutingRules`.
        is_grouped: whether a grouped GEMM multiplies by it (Transformer Engine's experts).
    """
    layer = name.split(".")[-2] if "." in name else ""
    if layer == "linear_fc1":
        return _gated(rows, config, is_grouped, joined="gate" not in split)
    if "heads" in split:
        return _by_heads(layer, config)
    return _by_projections(layer, config) if "qkv" in split else RowPattern()


def _gated(rows: int, config: TransformerConfig, is_grouped: bool, joined: bool) -> RowPattern:
    """Gate and up projection of an MLP.

    Each tensor-parallel rank has its gate rows above its up rows (MC/transformer/mlp.py:206), or
    blocks of them in turn (MC/transformer/moe/experts.py:720).
    """
    if not config.gated_linear_unit:
        return RowPattern()
    interleaved = config.moe_mlp_glu_interleave_size if is_grouped else None
    block = interleaved or rows // 2
    return RowPattern((Part("gate", block), Part("up", block)), joined=joined)


def _by_projections(layer: str, config: TransformerConfig) -> RowPattern:
    """Attention, all heads of a projection in one matrix."""
    if layer == "linear_qkv":
        return RowPattern(_query_group(config))
    if layer == "linear_kv_up_proj":
        return RowPattern(_latent_head(config))
    if layer == "linear_kv_down_proj":
        return RowPattern(_latent(config))
    return RowPattern()


def _by_heads(layer: str, config: TransformerConfig) -> RowPattern:
    """Attention, head by head; what all heads share stays one matrix."""
    if layer == "linear_qkv":
        return RowPattern(_heads_of_query_group(config), separate_periods=True)
    if layer in ("linear_q_proj", "linear_q_up_proj"):
        query = Part("query", config.qk_head_dim + config.qk_pos_emb_head_dim)
        return RowPattern((query,), separate_periods=True)
    if layer == "linear_kv_up_proj":
        return RowPattern(_latent_head(config), separate_periods=True)
    return _by_projections(layer, config)


def _query_group(config: TransformerConfig) -> tuple[Part, ...]:
    """A query group's rows of `linear_qkv` (MC/transformer/attention.py:1828)."""
    head = config.kv_channels
    queries = config.num_attention_heads // config.num_query_groups * head
    gate = [Part("gate", queries)] if config.attention_output_gate else []
    return (Part("query", queries), *gate, Part("key", head), Part("value", head))


def _heads_of_query_group(config: TransformerConfig) -> tuple[Part, ...]:
    """The same rows, head by head."""
    head = config.kv_channels
    return tuple(
        Part(f"{part.name}.{index}" if part.rows > head else part.name, head)
        for part in _query_group(config)
        for index in range(part.rows // head)
    )


def _latent_head(config: TransformerConfig) -> tuple[Part, ...]:
    """A head's rows of `linear_kv_up_proj` (MC/transformer/multi_latent_attention.py:930)."""
    return (Part("key", config.qk_head_dim), Part("value", config.v_head_dim))


def _latent(config: TransformerConfig) -> tuple[Part, ...]:
    """The rows of `linear_kv_down_proj` (MC/transformer/multi_latent_attention.py:662)."""
    parts = (
        Part("latent", config.kv_lora_rank),
        Part("rope_key", config.qk_pos_emb_head_dim),
    )
    return tuple(part for part in parts if part.rows)
