"""Context parallelism and multi-latent attention for megatron's plain-torch attention.

It refuses the first; here each rank keeps its queries and gathers all keys and values, which would
defeat the purpose of long sequences. It does not know the second, whose keys and values differ in
width. Both exist to test on CPU that what lies around attention is right.
"""

import copy
from typing import Any

import torch
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention


class GatheringDotProductAttention(DotProductAttention):
    """DotProductAttention over the whole sequence, for the queries of one context-parallel rank.

    Heads have keys of width `k_channels`, which the base class reads off the keys, and values of
    width `v_channels`, or `config.kv_channels`.
    """

    def __init__(
        self, config: Any, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any
    ) -> None:
        # The base class asserts that there is no context parallelism (dot_product_attention.py:58).
        config = copy.copy(config)
        config.context_parallel_size = 1
        super().__init__(config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(
        self, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Attend from the rank's queries (s / cp, b, heads, d) to the keys of all ranks."""
        group = get_context_parallel_group()
        if group.size() > 1:
            attention_mask = causal_mask(query.size(0), group.rank(), group.size())
            key = gather_from_sequence_parallel_region(key, group=group)
            value = gather_from_sequence_parallel_region(value, group=group)
        return super().forward(query, key, value, attention_mask, *args, **kwargs)


def causal_mask(length: int, rank: int, ranks: int) -> torch.Tensor:
    """Boolean (1, 1, length, length * ranks): which keys, in the order of ranks, are hidden.

    Megatron cuts the sequence into 2 * ranks chunks, and rank i of those with `length` tokens has
    the i-th from the front and the i-th from the back (core/utils.py:2456).
    """
    chunks = torch.arange(length * ranks).view(2 * ranks, -1)
    positions = torch.stack([torch.cat([chunks[r], chunks[-1 - r]]) for r in range(ranks)])
    return (positions.flatten()[None, :] > positions[rank][:, None])[None, None]
