"""What a run chooses about Dion: one object, from the command line or a script to the optimizer."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_dion.algorithm.config import DionConfig, check_fields, checked
from megatron_dion.optimizer.rules import RoutingRules


@dataclass(frozen=True)
class DionOptions:
    """What a run chooses about Dion.

    Raises:
        ValueError: a value is outside of its range.
    """

    config: DionConfig = field(default_factory=DionConfig)

    rules: RoutingRules = field(default_factory=RoutingRules)

    scalar_optimizer: Literal["adam", "lion"] = "adam"
    """Optimizer of the parameters that are not matrices of linear layers."""

    scalar_lr_mult: float = checked(1.0, lambda x: 0 < x < math.inf, "positive and finite")
    """Learning rate of the scalar optimizer, as a multiple of --lr."""

    compressed_sync: bool = False
    """Average low-rank factors in place of gradients over the instances of
    --num-distributed-optimizer-instances, where the factors are smaller."""

    recenter_interval: int | None = checked(None, lambda n: n is None or n >= 1, "at least 1")
    """With --dion-compressed-sync, replace momenta by their mean over the instances every N
    iterations."""

    log_interval: int | None = checked(None, lambda n: n is None or n >= 1, "at least 1")
    """Log the diagnostics of the step of every N-th iteration, matrix by matrix."""

    reinit_factors: bool = False
    """Load the momenta of a checkpoint, also with another rank or split, and begin the right
    factors anew."""

    def __post_init__(self) -> None:
        check_fields(self)
