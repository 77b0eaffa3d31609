"""Which logical matrices the rows of a weight belong to, by the name of its linear layer.

Megatron fuses weights: the rows of query, key and value take turns in one parameter, and so do
those of gate and up projection. `megatron_dion.sharding.matrices.Weight` describes one period of
the rows.
"""

from dataclasses import replace
from typing import Any

from megatron_dion.sharding.matrices import Part, Weight


def split_weight(
    weight: Weight, config: Any, split: frozenset[str], is_grouped: bool = False
) -> Weight:
    """The weight with the logical matrices of its rows.

    Args:
        weight: as one matrix; `weight.rows` are those of a rank's parameter.
        config: Megatron's `TransformerConfig` of the layer; the layers of a model may differ.
        split: which fused weights are split, as in `RoutingRules`.
        is_grouped: whether a grouped GEMM multiplies by the weight (Transformer Engine's experts).
    """
    layer = weight.name.split(".")[-2] if "." in weight.name else ""
    if layer == "linear_fc1" and config.gated_linear_unit:
        # Each tensor-parallel rank has its gate rows above its up rows (MC/transformer/mlp.py:206);
        # grouped experts may have blocks of them in turn (MC/transformer/moe/experts.py:720).
        block = config.moe_mlp_glu_interleave_size if is_grouped else None
        rows = block or weight.rows // 2
        # Without "gate" both are one matrix, in an order of rows that no topology changes.
        gate_and_up = (Part("gate", rows), Part("up", rows))
        return replace(weight, parts=gate_and_up, joined="gate" not in split)
    if not split & {"qkv", "heads"}:
        return weight
    by_head = "heads" in split
    parts = _parts_of_attention(layer, config, by_head)
    has_heads = bool(parts) and layer != "linear_kv_down_proj"  # which all heads share
    return replace(weight, parts=parts, separate_periods=by_head and has_heads)


def _parts_of_attention(layer: str, config: Any, by_head: bool) -> tuple[Part, ...]:
    """One period of rows; its matrices have the rows of all heads or, by head, of one."""
    if layer == "linear_qkv":  # MC/transformer/attention.py:1828
        head, queries = config.kv_channels, config.num_attention_heads // config.num_query_groups
        kinds = ["query", "gate"] if config.attention_output_gate else ["query"]
        parts = [Part(kind, queries * head) for kind in kinds]
        if by_head and queries > 1:
            parts = [Part(f"{kind}.{i}", head) for kind in kinds for i in range(queries)]
        return (*parts, Part("key", head), Part("value", head))
    if layer == "linear_kv_up_proj":  # MC/transformer/multi_latent_attention.py:930
        return (Part("key", config.qk_head_dim), Part("value", config.v_head_dim))
    if layer == "linear_kv_down_proj":  # MC/transformer/multi_latent_attention.py:662
        rope = config.qk_pos_emb_head_dim
        latent = Part("latent", config.kv_lora_rank)
        return (latent, Part("rope_key", rope)) if rope else (latent,)
    if by_head and layer in ("linear_q_proj", "linear_q_up_proj"):
        return (Part("query", config.qk_head_dim + config.qk_pos_emb_head_dim),)
    return ()
