"""Curves of a run, their means, and what chance alone does to them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion_tools.errors import ToolError

Curve = Mapping[int, float]
"""A quantity by iteration."""

LOSS = "lm_loss"
GRAD_NORM = "grad_norm"
VALIDATION_LOSS = "validation_loss"
QUANTITIES = (LOSS, GRAD_NORM, VALIDATION_LOSS, "lr")
"""The quantities that `compare` compares by default."""

# Single iterations are noise of their batches. A tenth of a run is long enough to average the noise
# and short enough to say where two curves part.
_WINDOW_SHARE = 0.1


@dataclass(frozen=True)
class Curves:
    """The curves of one run.

    Attributes:
        name: The name of the run.
        quantities: Curves by name, such as `lm_loss`, `grad_norm` and `validation_loss`.
    """

    name: str
    quantities: Mapping[str, Curve]

    def curve(self, quantity: str) -> Curve:
        """Return the curve of a quantity.

        Raises:
            ToolError: The run has no such curve; the message names those that it has.
        """
        if not self.quantities.get(quantity):
            names = ", ".join(self.quantities) or "nothing"
            raise ToolError(f"{self.name} has no curve of {quantity} (it has {names})")
        return self.quantities[quantity]


def read_curves(path: Path, name: str) -> Curves:
    """Read the curves of a run from a metrics.jsonl, or from a folder that has one.

    Those of a validation get the prefix `validation_`.

    Later values win: a resumed run writes repeated iterations a second time.

    Raises:
        ToolError: There is no such file, or it has other content.
    """
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    if not metrics.is_file():
        raise ToolError(f"{path}: neither a metrics.jsonl, nor a folder with one")
    curves: dict[str, dict[int, float]] = {}
    try:
        for record in read_metrics(metrics):
            kind = record.get("kind", "train")
            for key, value in record.items():
                if type(value) in (int, float) and key != "iteration":
                    quantity = key if kind == "train" else f"{kind}_{key.removeprefix('lm_')}"
                    curves.setdefault(quantity, {})[record["iteration"]] = float(value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolError(f"{metrics}: not lines of metrics ({error!r})") from error
    return Curves(name, {name: dict(sorted(curve.items())) for name, curve in curves.items()})


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

    Raises:
        ToolError: There are fewer than three seeds.
    """
    if len(curves) < 3:
        raise ToolError(f"seed noise needs three seeds or more, not {len(curves)}")
    each = [smoothed(curve, window) for curve in curves]
    common = [i for i in each[0] if all(i in curve for curve in each)]
    variances = {i: statistics.variance([curve[i] for curve in each]) for i in common}
    return {i: math.sqrt(variance) for i, variance in smoothed(variances, window).items()}
