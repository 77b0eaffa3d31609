"""Diagnostics of optimizer steps, matrix by matrix, and their lines in metrics.jsonl."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron_dion.optimizer.rules import without_numbers

KIND = "dion"  # of the lines of metrics.jsonl that have diagnostics
FIGURES = ("captured", "update_norm", "momentum_norm")  # what a step measures


class MatrixDiagnostics(NamedTuple):
    """One step of one logical matrix W (m, n), in the notation of `megatron_dion.algorithm.step`.

    `captured` is ||R||_F / ||B||_F, the fraction of B = M + G with which the step works;
    `update_norm` the Frobenius norm of the change of W, without weight decay and without the floor
    of short rows of the residual; `momentum_norm` ||M||_F after the step. With replicas R is their
    mean and B that of one, so that two of the figures are approximate.
    """

    name: str  # as in routing.tsv
    rows: int
    columns: int
    rank: int
    captured: float | None  # None where B is zero
    update_norm: float | None
    momentum_norm: float | None


class Snapshot(NamedTuple):
    """The diagnostics of all matrices of a model in one iteration."""

    iteration: int
    matrices: tuple[MatrixDiagnostics, ...]


_, *_FIELDS = MatrixDiagnostics._fields  # all but the name


def to_record(snapshot: Snapshot) -> dict[str, Any]:
    """The line of metrics.jsonl: for each matrix its values, in the order of `fields`."""
    matrices = {name: list(map(_rounded, row)) for name, *row in snapshot.matrices}
    return {"kind": KIND, "iteration": snapshot.iteration, "fields": _FIELDS, "matrices": matrices}


def read_diagnostics(records: Iterable[dict[str, Any]]) -> list[Snapshot]:
    """The snapshots among the lines of metrics.jsonl; a figure that was not finite is None.

    Raises:
        ValueError: another version of megatron-dion wrote them, with other fields.
    """
    snapshots = []
    for record in (record for record in records if record["kind"] == KIND):
        if record["fields"] != _FIELDS:
            raise ValueError(f"the fields of its diagnostics are not {', '.join(_FIELDS)}")
        matrices = (MatrixDiagnostics(name, *row) for name, row in record["matrices"].items())
        snapshots.append(Snapshot(record["iteration"], tuple(matrices)))
    return snapshots


def by_kind(matrices: Sequence[MatrixDiagnostics], figure: str) -> dict[str, list[float]]:
    """The finite values of one of `FIGURES`, by names without numbers of layers and experts."""
    kinds: dict[str, list[float]] = {}
    for matrix in matrices:
        value = getattr(matrix, figure)
        if value is not None and math.isfinite(value):
            kinds.setdefault(without_numbers(matrix.name), []).append(value)
    return kinds


def _rounded(value: Any) -> Any:
    """A float with five digits; None if it is not finite, which JSON cannot express."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None
