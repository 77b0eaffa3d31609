"""Dion's logical matrices as a checkpoint holds them, read without a run and without Megatron."""

from dataclasses import dataclass
from typing import Any

from megatron_dion.checkpointing.contents import Contents
from megatron_dion.optimizer.keys import DION_PREFIX, KINDS, WEIGHT
from megatron_dion.optimizer.record import Record


@dataclass(frozen=True)
class StoredMatrix:
    """A logical matrix in a checkpoint.

    Attributes:
        name: of the matrix.
        rows: m.
        columns: n.
        rank: r.
        dtypes: of weight, momentum and right factor.
    """

    name: str
    rows: int
    columns: int
    rank: int
    dtypes: tuple[str, ...]

    def key(self, kind: str) -> str:
        """The checkpoint's key of a tensor, one of `KINDS`."""
        return f"{DION_PREFIX}.{kind}.{self.name}"


def record_of(common: dict[str, Any]) -> Record | None:
    """What a checkpoint says of the run with Dion that wrote it; None if its optimizer is another.

    Raises:
        CheckpointError: a newer version wrote it.
    """
    state = common.get("optimizer", {})
    return Record.from_dict(state["dion"]) if "dion" in state else None


def stored_matrices(contents: Contents) -> tuple[list[StoredMatrix], list[str]]:
    """All logical matrices, and what is missing or does not fit together."""
    found, problems = [], []
    tensors = contents.tensors
    prefix = f"{DION_PREFIX}.{WEIGHT}."
    for key in tensors:
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        entries = [tensors.get(f"{DION_PREFIX}.{kind}.{name}") for kind in KINDS]
        weight, momentum, right = entries
        if weight is None or momentum is None or right is None:
            missing = [kind for kind, entry in zip(KINDS, entries, strict=True) if entry is None]
            problems.append(f"{name} has no {' and no '.join(missing)}")
            continue
        if momentum.size != weight.size or right.size[0] != weight.size[0]:
            problems.append(
                f"{name}: weight {tuple(weight.size)}, momentum {tuple(momentum.size)} and right"
                f" factor {tuple(right.size)} do not fit together"
            )
        rows, columns = weight.size
        dtypes = tuple(
            str(entry.properties.dtype).removeprefix("torch.")
            for entry in (weight, momentum, right)
        )
        found.append(StoredMatrix(name, rows, columns, right.size[1], dtypes))
    return found, problems
