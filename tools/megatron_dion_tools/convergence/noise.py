"""What chance alone does to a curve, measured over seeds; and means over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dion_tools.convergence.curves import Curve
from megatron_dion_tools.convergence.errors import ConvergenceError

# Single iterations are noise of their batches. A tenth of a run is long enough to average it, short
# enough to say where two curves part.
_WINDOW_SHARE = 0.1

# Two-sided 95 % quantiles of Student's t by degrees of freedom (1 to 9), and of the normal.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.96


def window_of(curve: Curve) -> int:
    """Number of points over which a curve is averaged."""
    return max(1, round(_WINDOW_SHARE * len(curve)))


def smoothed(curve: Curve, window: int) -> dict[int, float]:
    """Means over the last `window` points up to each iteration; over fewer at the beginning."""
    values = list(curve.values())
    return {
        iteration: statistics.fmean(values[max(0, position - window + 1) : position + 1])
        for position, iteration in enumerate(curve)
    }


def seed_noise(curves: Sequence[Curve], window: int) -> dict[int, float]:
    """The standard deviation over seeds of a smoothed curve, at each iteration.

    Few seeds estimate it badly, so it is itself averaged (its square) over the last `window`
    points.

    Args:
        curves: of one quantity of the same run, a curve for each seed.
        window: number of points of both averages.

    Raises:
        ConvergenceError: there are fewer than three seeds.
    """
    if len(curves) < 3:
        raise ConvergenceError(f"seed noise needs three seeds or more, not {len(curves)}")
    each = [smoothed(curve, window) for curve in curves]
    common = [i for i in each[0] if all(i in curve for curve in each)]
    variances = {i: statistics.variance([curve[i] for curve in each]) for i in common}
    return {i: math.sqrt(variance) for i, variance in smoothed(variances, window).items()}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        margin: half the width of its 95 % confidence interval (Student's t).
        seeds: number of values.
    """

    mean: float
    margin: float
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a mean from a value for each seed; one value alone has an infinite margin."""
    n = len(values)
    if n < 2:
        return Estimate(statistics.fmean(values), math.inf, n)
    # Not `stdev`, which raises where a value is not finite.
    margin = _student(n - 1) * math.sqrt(statistics.variance(values) / n)
    return Estimate(statistics.fmean(values), margin, n)


def _student(degrees: int) -> float:
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = _NORMAL  # and Cornish and Fisher's expansion: off by less than 0.003
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
