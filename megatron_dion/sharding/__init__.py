"""Where the rows of logical matrices live, and how the sums of a step cross ranks."""

from megatron_dion.sharding.blocks import Rectangle, boxes, rectangles
from megatron_dion.sharding.collectives import (
    TORCH_DTYPES,
    Groups,
    average,
    rank_in,
    ring_bytes,
    size_of,
)
from megatron_dion.sharding.exchange import ShardedExchange, bytes_sent
from megatron_dion.sharding.layout import Grid, Layout, Placement, Rank
from megatron_dion.sharding.matrices import Part, Weight, compression_pays
from megatron_dion.sharding.plan import Plan, make_plan
from megatron_dion.sharding.sets import sets_of

__all__ = [
    "TORCH_DTYPES",
    "Grid",
    "Groups",
    "Layout",
    "Part",
    "Placement",
    "Plan",
    "Rank",
    "Rectangle",
    "ShardedExchange",
    "Weight",
    "average",
    "boxes",
    "bytes_sent",
    "compression_pays",
    "make_plan",
    "rank_in",
    "rectangles",
    "ring_bytes",
    "sets_of",
    "size_of",
]
