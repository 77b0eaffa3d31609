"""Context parallelism and multi-latent attention for megatron's plain-torch attention.

It refuses the first: here each rank keeps its queries and gathers all keys and values, which is
correct for every causal model, and of no use for long sequences, where it would defeat the purpose.
It does not know the second, whose keys and values differ in width. Both exist to test on CPU that
what lies around attention is right.
"""

import copy
from typing import Any

import torch
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention


class GatheringDotProductAttention(DotProductAttention):
    """DotProductAttention over the whole sequence, for the queries of one context-parallel rank.

    Args:
        config: of the transformer.
        *args, **kwargs: as for `DotProductAttention`.
        k_channels: width of a head's keys; the base class reads it off the keys.
        v_channels: width of a head's values if not `config.kv_channels`.
    """

    def __init__(
        self,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        # The base class asserts that there is no context parallelism (dot_product_attention.py:58).
        config = copy.copy(config)
        config.context_parallel_size = 1
        super().__init__(config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend from the rank's queries (s / cp, b, heads, d) to the keys of all ranks."""
        group = get_context_parallel_group()
        if group.size() > 1:
            attention_mask = causal_mask(query.size(0), group.rank(), group.size())
            key = gather_from_sequence_parallel_region(key, group=group)
            value = gather_from_sequence_parallel_region(value, group=group)
        return super().forward(query, key, value, attention_mask, *args, **kwargs)


def causal_mask(tokens_per_rank: int, rank: int, ranks: int) -> torch.Tensor:
    """Mask what a rank's queries must not see, keys being in the order of the ranks.

    Args:
        tokens_per_rank: Sequence length divided by `ranks`; even.
        rank: The context-parallel rank that asks.
        ranks: Size of the context-parallel group.

    Returns:
        Boolean (1, 1, tokens_per_rank, tokens_per_rank * ranks), true where masked.
    """
    keys = torch.cat([token_positions(tokens_per_rank, r, ranks) for r in range(ranks)])
    queries = token_positions(tokens_per_rank, rank, ranks)
    return (keys[None, :] > queries[:, None])[None, None]


def token_positions(tokens_per_rank: int, rank: int, ranks: int) -> torch.Tensor:
    """Positions in the sequence of a rank's tokens: one chunk from the front, one from the back.

    Megatron deals chunks like this so that causal attention costs every rank the same
    (core/utils.py:2456).
    """
    chunk = tokens_per_rank // 2
    front, back = rank, 2 * ranks - 1 - rank
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in (front, back)])
