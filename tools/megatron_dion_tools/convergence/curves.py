"""Curves of a run, read from metrics.jsonl or from a TensorBoard folder."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion_tools.convergence.errors import ConvergenceError

Curve = Mapping[int, float]
"""A quantity by iteration."""

LOSS = "lm_loss"
GRAD_NORM = "grad_norm"
VALIDATION_LOSS = "validation_loss"
QUANTITIES = (LOSS, GRAD_NORM, VALIDATION_LOSS, "lr")
"""What is kept of a golden run, and compared where nobody says what."""

# What Megatron writes for TensorBoard, in the words of metrics.jsonl. It writes most of it twice,
# the second time by the number of samples.
_TENSORBOARD_NAMES = {
    "lm loss": LOSS,
    "grad-norm": GRAD_NORM,
    "learning-rate": "lr",
    "lm loss validation": VALIDATION_LOSS,
}
_BY_SAMPLES = " vs samples"
# Counters and clocks say nothing about convergence, and differ between any two runs.
_NOT_CURVES = ("kind", "iteration", "tokens", "skipped", "householder_fallbacks", "optimizer_bytes")
_CLOCKS = "_seconds"


@dataclass(frozen=True)
class Curves:
    """The curves of one run.

    Attributes:
        name: of the run.
        quantities: curves by name, such as `lm_loss`, `grad_norm`, `lr` and `validation_loss`.
        single_precision: whether they were rounded to float32, which is what TensorBoard keeps.
    """

    name: str
    quantities: Mapping[str, Curve]
    single_precision: bool = False

    def curve(self, quantity: str) -> Curve:
        """The curve of a quantity.

        Raises:
            ConvergenceError: the run has none; names those it has.
        """
        if quantity not in self.quantities:
            has = ", ".join(self.quantities) or "nothing"
            raise ConvergenceError(f"{self.name} has no curve of {quantity} (it has {has})")
        return self.quantities[quantity]

    def rounded(self) -> "Curves":
        """The same curves in single precision."""
        if self.single_precision:
            return self
        return Curves(
            name=self.name,
            quantities={
                quantity: {i: float(np.float32(value)) for i, value in curve.items()}
                for quantity, curve in self.quantities.items()
            },
            single_precision=True,
        )


def read_curves(path: Path, name: str | None = None) -> Curves:
    """Read the curves of a run.

    Args:
        path: a metrics.jsonl, a folder that has one, or a folder with TensorBoard's event files.
        name: of the run; by default the path.

    Raises:
        ConvergenceError: there is nothing to read, or it is no such file.
    """
    name = str(path) if name is None else name
    if path.is_file():
        return Curves(name, _from_metrics(path))
    if (path / "metrics.jsonl").is_file():
        return Curves(name, _from_metrics(path / "metrics.jsonl"))
    if any(path.glob("events.out.tfevents.*")):
        return Curves(name, _from_tensorboard(path), single_precision=True)
    raise ConvergenceError(
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
        raise ConvergenceError(f"{path}: not lines of metrics ({error!r})") from error


def _values(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    prefix = "" if record.get("kind", "train") == "train" else f"{record['kind']}_"
    for name, value in record.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and name not in _NOT_CURVES and not name.endswith(_CLOCKS):
            yield f"{prefix}{name.removeprefix('lm_') if prefix else name}", float(value)


def _from_tensorboard(folder: Path) -> dict[str, Curve]:
    # Only now: it is a large package, and metrics.jsonl needs none of it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return _by_quantity(
        (_TENSORBOARD_NAMES.get(tag, tag), event.step, float(event.value))
        for tag in events.Tags()["scalars"]
        if not tag.endswith(_BY_SAMPLES)
        for event in events.Scalars(tag)
    )


def _by_quantity(points: Iterable[tuple[str, int, float]]) -> dict[str, Curve]:
    """Later values win: a resumed run writes the iterations that it does again a second time."""
    curves: dict[str, dict[int, float]] = {}
    for name, iteration, value in points:
        curves.setdefault(name, {})[iteration] = value
    return {name: dict(sorted(curve.items())) for name, curve in sorted(curves.items())}
