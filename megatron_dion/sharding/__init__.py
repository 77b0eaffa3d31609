"""Where the rows of logical matrices live, and how the sums of a step cross ranks."""

from megatron_dion.sharding.blocks import Rectangle, boxes, rectangles
from megatron_dion.sharding.collectives import TORCH_DTYPES, Groups
from megatron_dion.sharding.exchange import ShardedExchange
from megatron_dion.sharding.layout import Grid, Held, Layout, Placement, Rank
from megatron_dion.sharding.matrices import Part, Weight
from megatron_dion.sharding.plan import Plan, Planner
from megatron_dion.sharding.sets import sets_in_turn, sets_of, sets_within

__all__ = [
    "TORCH_DTYPES",
    "Grid",
    "Groups",
    "Held",
    "Layout",
    "Part",
    "Placement",
    "Plan",
    "Planner",
    "Rank",
    "Rectangle",
    "ShardedExchange",
    "Weight",
    "boxes",
    "rectangles",
    "sets_in_turn",
    "sets_of",
    "sets_within",
]
