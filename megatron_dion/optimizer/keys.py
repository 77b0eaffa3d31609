"""The names of optimizer state in a checkpoint: what a run writes and a reader looks for."""

PREFIX = "optimizer.state"
DION_PREFIX = f"{PREFIX}.dion"

# Megatron's name for master weights (MC/optimizer/distrib_optimizer.py:1113).
MASTER = "param"

# Dion's state of a logical matrix: `optimizer.state.dion.<kind>.<matrix>`.
WEIGHT = "weight"
MOMENTUM = "momentum"
RIGHT_FACTOR = "right_factor"
KINDS = (WEIGHT, MOMENTUM, RIGHT_FACTOR)
