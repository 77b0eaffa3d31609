"""What chance alone does to a curve, measured over seeds."""

import math
import statistics
from collections.abc import Sequence

from megatron_dion_tools.convergence.curves import Curve
from megatron_dion_tools.errors import ToolError

# Single iterations are noise of their batches. A tenth of a run is long enough to average the noise
# and short enough to say where two curves part.
_WINDOW_SHARE = 0.1


def window_of(curve: Curve) -> int:
    """Return the number of points over which a curve is averaged."""
    return max(1, round(_WINDOW_SHARE * len(curve)))


def smoothed(curve: Curve, window: int) -> dict[int, float]:
    """Return means over the last `window` points up to each iteration; over fewer at the start."""
    values = list(curve.values())
    return {
        iteration: statistics.fmean(values[max(0, position - window + 1) : position + 1])
        for position, iteration in enumerate(curve)
    }


def seed_noise(curves: Sequence[Curve], window: int) -> dict[int, float]:
    """Return the standard deviation over seeds of a smoothed curve at each iteration.

    Few seeds estimate the variance badly, so the variance is averaged over `window` points too.

    Args:
        curves: One for each seed, of one quantity of one run.
        window: Number of points of both averages.

    Raises:
        ToolError: There are fewer than three seeds.
    """
    if len(curves) < 3:
        raise ToolError(f"seed noise needs three seeds or more, not {len(curves)}")
    each = [smoothed(curve, window) for curve in curves]
    common = [i for i in each[0] if all(i in curve for curve in each)]
    variances = {i: statistics.variance([curve[i] for curve in each]) for i in common}
    return {i: math.sqrt(variance) for i, variance in smoothed(variances, window).items()}
