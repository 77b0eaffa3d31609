"""Curves of a run, read from metrics.jsonl or from TensorBoard's files."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion_tools.errors import ToolError

Curve = Mapping[int, float]
"""A quantity by iteration."""

LOSS = "lm_loss"
GRAD_NORM = "grad_norm"
VALIDATION_LOSS = "validation_loss"
QUANTITIES = (LOSS, GRAD_NORM, VALIDATION_LOSS, "lr")
"""The quantities that golden files have, and that `compare` compares by default."""

# Megatron's names in TensorBoard. Megatron writes most curves a second time, by number of samples.
_TENSORBOARD_NAMES = {
    "lm loss": LOSS,
    "grad-norm": GRAD_NORM,
    "learning-rate": "lr",
    "lm loss validation": VALIDATION_LOSS,
}
_BY_SAMPLES = " vs samples"


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
    """Read the curves of a run.

    Args:
        path: A metrics.jsonl, a folder that has one, or a folder with TensorBoard's event files.
        name: The name of the run.

    Raises:
        ToolError: There is no such file, or it has other content.
    """
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    if metrics.is_file():
        return Curves(name, _from_metrics(metrics))
    if any(path.glob("events.out.tfevents.*")):
        return Curves(name, _from_tensorboard(path))
    raise ToolError(
        f"{path}: neither a metrics.jsonl, nor a folder with one or with TensorBoard's event files"
    )


def _from_metrics(path: Path) -> dict[str, Curve]:
    try:
        return _by_quantity(
            (name, record["iteration"], value)
            for record in read_metrics(path)
            for name, value in _values(record)
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolError(f"{path}: not lines of metrics ({error!r})") from error


def _values(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield names and numbers; those of a validation get the prefix `validation_`."""
    kind = record.get("kind", "train")
    for name, value in record.items():
        if type(value) in (int, float) and name != "iteration":
            full_name = name if kind == "train" else f"{kind}_{name.removeprefix('lm_')}"
            yield full_name, float(value)


def _from_tensorboard(folder: Path) -> dict[str, Curve]:
    # TensorBoard is a large package, which metrics.jsonl does not need.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return _by_quantity(
        (_TENSORBOARD_NAMES.get(tag, tag), event.step, float(event.value))
        for tag in events.Tags()["scalars"]
        if not tag.endswith(_BY_SAMPLES)
        for event in events.Scalars(tag)
    )


def _by_quantity(points: Iterable[tuple[str, int, float]]) -> dict[str, Curve]:
    """Collect curves, rounded to float32 as TensorBoard has them.

    Later values win: a resumed run writes repeated iterations a second time.
    """
    curves: dict[str, dict[int, float]] = {}
    for name, iteration, value in points:
        curves.setdefault(name, {})[iteration] = float(np.float32(value))
    return {name: dict(sorted(curve.items())) for name, curve in sorted(curves.items())}
