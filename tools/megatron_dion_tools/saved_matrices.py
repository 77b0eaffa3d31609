"""Dion's logical matrices as a checkpoint holds them, read without a run and without Megatron."""

from dataclasses import dataclass

from megatron_dion.checkpointing.contents import Contents
from megatron_dion.optimizer.record import DION_PREFIX, KINDS, MOMENTUM, RIGHT_FACTOR, WEIGHT


@dataclass(frozen=True)
class SavedMatrix:
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


def saved_matrices(contents: Contents) -> tuple[list[SavedMatrix], list[str]]:
    """All logical matrices, and what is missing or does not fit together."""
    matrices, problems = [], []
    tensors, start = contents.tensors, f"{DION_PREFIX}.{WEIGHT}."
    for name in (key.removeprefix(start) for key in tensors if key.startswith(start)):
        entries = {kind: tensors.get(f"{DION_PREFIX}.{kind}.{name}") for kind in KINDS}
        if missing := [kind for kind, entry in entries.items() if entry is None]:
            problems.append(f"{name} has no {' and no '.join(missing)}")
            continue
        sizes = {kind: tuple(entry.size) for kind, entry in entries.items() if entry}
        rows, columns = sizes[WEIGHT]
        rank = sizes[RIGHT_FACTOR][1]
        if sizes[MOMENTUM] != (rows, columns) or sizes[RIGHT_FACTOR][0] != rows:
            listed = ", ".join(f"{kind} {size}" for kind, size in sizes.items())
            problems.append(f"{name}: {listed} do not fit together")
        dtypes = tuple(
            str(entry.properties.dtype).removeprefix("torch.")
            for entry in entries.values()
            if entry
        )
        matrices.append(SavedMatrix(name, rows, columns, rank, dtypes))
    return matrices, problems
