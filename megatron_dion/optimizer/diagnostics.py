"""Figures of a step, matrix by matrix, and their lines in metrics.jsonl."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_dion.optimizer.rules import without_numbers

KIND = "diagnostics"
"""What lines of metrics.jsonl say in "kind"."""

ENERGY_LEVELS = (0.5, 0.75, 0.9, 0.95, 0.99)
"""Shares of the energy of B for which diagnostics say how many directions have them."""

FIGURES = (
    "captured",
    "stable_rank",
    "orthonormality_error",
    "update_rms",
    "update_norm",
    "momentum_norm",
    "owner_seconds",
)

_DIGITS = 5


@dataclass(frozen=True)
class MatrixDiagnostics:
    """One step of one logical matrix W (m, n), in the notation of `megatron_dion.algorithm.step`.

    Figures that are not finite, of a step that broke down, are None when they are read back.

    Attributes:
        name: as in routing.tsv.
        rows: m.
        columns: n.
        rank: r.
        captured: ||P R^T||_F / ||B||_F; its square is the share of the energy ||B||_F^2. None where
            B is zero.
        stable_rank: ||B||_F^2 / ||B||_2^2. Of ||B||_2 is known that it is at least ||R||_2, which
            stands for it: so this is at least the stable rank. None where R is zero.
        orthonormality_error: ||P^T P - I||_F.
        update_rms: root mean square of the elements of lr scale Q P^T.
        update_norm: spectral norm of the same.
        momentum_norm: ||M||_F after the step.
        owner_seconds: time that orthonormalizing P took on the rank in charge, or on all of them
            together.
        energy_ranks: for each of `ENERGY_LEVELS`, how many of the r directions have that share of
            ||B||_F^2, the largest first; None where all r have less.
    """

    name: str
    rows: int
    columns: int
    rank: int
    captured: float | None
    stable_rank: float | None
    orthonormality_error: float | None
    update_rms: float | None
    update_norm: float | None
    momentum_norm: float | None
    owner_seconds: float | None
    energy_ranks: tuple[int | None, ...]

    @property
    def kind(self) -> str:
        """The name without the numbers of layer and expert."""
        return without_numbers(self.name)


_FIELDS = [field.name for field in fields(MatrixDiagnostics) if field.name != "name"]


@dataclass(frozen=True)
class Snapshot:
    """The diagnostics of all matrices of a model in one iteration."""

    iteration: int
    matrices: tuple[MatrixDiagnostics, ...]


@dataclass(frozen=True)
class Spread:
    """Of a figure over several matrices."""

    min: float
    median: float
    max: float


def to_record(snapshot: Snapshot) -> dict[str, Any]:
    """The line of metrics.jsonl: per matrix a list in the order of `fields`."""
    values = [asdict(matrix) for matrix in snapshot.matrices]
    return {
        "kind": KIND,
        "iteration": snapshot.iteration,
        "energy_levels": list(ENERGY_LEVELS),
        "fields": _FIELDS,
        "matrices": {found["name"]: [_short(found[name]) for name in _FIELDS] for found in values},
    }


def read_diagnostics(records: Iterable[dict[str, Any]]) -> list[Snapshot]:
    """The snapshots among the lines of metrics.jsonl.

    Raises:
        ValueError: another version wrote them, with other figures.
    """
    return [_snapshot(record) for record in records if record["kind"] == KIND]


def by_kind(matrices: Sequence[MatrixDiagnostics]) -> dict[str, dict[str, Spread]]:
    """Of every kind of matrix the spread of each of `FIGURES`, where any of them has it, finite."""
    kinds: defaultdict[str, list[MatrixDiagnostics]] = defaultdict(list)
    for matrix in matrices:
        kinds[matrix.kind].append(matrix)
    found: dict[str, dict[str, Spread]] = {}
    for kind, alike in kinds.items():
        values = {name: [getattr(matrix, name) for matrix in alike] for name in FIGURES}
        known = {
            name: [v for v in of if v is not None and math.isfinite(v)]
            for name, of in values.items()
        }
        found[kind] = {
            name: Spread(min(of), statistics.median(of), max(of))
            for name, of in known.items()
            if of
        }
    return found


def _snapshot(record: dict[str, Any]) -> Snapshot:
    if record["fields"] != _FIELDS or record["energy_levels"] != list(ENERGY_LEVELS):
        raise ValueError(
            f"the diagnostics of iteration {record['iteration']} have other figures than this"
            " version of megatron-dion writes: read them with the version that wrote them"
        )
    return Snapshot(
        record["iteration"],
        tuple(_matrix(name, values) for name, values in record["matrices"].items()),
    )


def _matrix(name: str, values: list[Any]) -> MatrixDiagnostics:
    given = dict(zip(_FIELDS, values, strict=True))
    return MatrixDiagnostics(name=name, **{**given, "energy_ranks": tuple(given["energy_ranks"])})


def _short(value: Any) -> Any:
    """A float with a few digits; JSON has no infinity and no NaN."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
