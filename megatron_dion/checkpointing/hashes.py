"""SHA-256 of checkpoint files, in the format of Megatron's `--verify-integrity`.

Megatron's own rank 0 reads the whole checkpoint, when it is saved and when it is loaded. Here each
rank hashes what it wrote, and the ranks divide the files among them when they load.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_dion.checkpointing.errors import CheckpointError

MANIFEST = "integrity.json"

_ALGORITHM = "sha256"

Hashes = dict[str, str]


def hash_files(folder: Path, names: Iterable[str]) -> Hashes:
    """Hexadecimal SHA-256 of some files of a folder."""
    return {name: _hash(folder / name) for name in names}


def data_files_of(folder: Path, rank: int) -> list[str]:
    """What a rank has written into the folder of a checkpoint."""
    return sorted(path.name for path in folder.glob(f"__{rank}_*"))


def write_manifest(folder: Path, hashes: Hashes) -> None:
    """Writes the hashes of all files (MC/dist_checkpointing/validation.py:441), and when.

    A copy of a folder may give its files the times of the copying; this one it keeps.
    """
    files = dict(sorted(hashes.items()))
    content = {"algorithm": _ALGORITHM, "written": time.time(), "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2))


def written_at(folder: Path) -> float | None:
    """When a checkpoint's manifest was written, in seconds since 1970; None if nothing says."""
    try:
        return float(json.loads((folder / MANIFEST).read_text())["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_manifest(folder: Path) -> Hashes | None:
    """The hashes of a checkpoint's files, or None if it was saved without.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if content["algorithm"] != _ALGORITHM:
            raise CheckpointError(
                f"{folder / MANIFEST} has hashes of {content['algorithm']}, not {_ALGORITHM}"
            )
        return dict(content["files"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error!r}") from error


def damage(folder: Path, expected: Hashes) -> list[str]:
    """Describes each file whose content is not what was saved."""
    found = []
    for name, digest in expected.items():
        try:
            if _hash(folder / name) != digest:
                found.append(f"{name} has changed since it was saved (SHA-256)")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _ALGORITHM).hexdigest()
