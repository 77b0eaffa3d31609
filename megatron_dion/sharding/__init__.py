"""Where the rows of logical matrices live, and how the sums of a step cross ranks."""

from megatron_dion.sharding.blocks import Rectangle, rectangles
from megatron_dion.sharding.exchange import ShardedExchange
from megatron_dion.sharding.matrices import Part, Weight
from megatron_dion.sharding.plan import Grid, Placement, Plan, Rank, make_plan

__all__ = [
    "Grid",
    "Part",
    "Placement",
    "Plan",
    "Rank",
    "Rectangle",
    "ShardedExchange",
    "Weight",
    "make_plan",
    "rectangles",
]
