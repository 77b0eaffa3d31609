"""SHA-256 of checkpoint files, in the format of Megatron's `--verify-integrity`.

Megatron reads the whole checkpoint on rank 0, when it saves and when it loads. Here each rank
hashes what it wrote, and the ranks share the work when they load.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_dion.checkpointing.errors import CheckpointError

MANIFEST = "integrity.json"

_ALGORITHM = "sha256"

Hashes = dict[str, str]


def hash_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _ALGORITHM).hexdigest()


def hash_files(paths: Iterable[Path]) -> Hashes:
    """Hexadecimal SHA-256 of files of one folder, by name."""
    return {path.name: hash_file(path) for path in paths}


def write_manifest(folder: Path, hashes: Hashes) -> None:
    """Writes the hashes of all files, and when that was: a copy of the files has other times."""
    files = dict(sorted(hashes.items()))
    content = {"algorithm": _ALGORITHM, "written": time.time_ns(), "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2))


def read_manifest(folder: Path) -> Hashes | None:
    """The hashes of a checkpoint's files, or None if it was saved without.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if content["algorithm"] != _ALGORITHM:
            raise ValueError(f"its hashes are of {content['algorithm']}, not {_ALGORITHM}")
        return dict(content["files"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error!r}") from error


def written_at(folder: Path) -> int:
    """When a checkpoint's manifest was written, in ns since 1970; 0 if that is not known."""
    try:
        return int(json.loads((folder / MANIFEST).read_text())["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def damage(folder: Path, expected: Mapping[str, str]) -> Iterator[str]:
    """Describes each file whose content is not what was saved."""
    for name, digest in expected.items():
        try:
            if hash_file(folder / name) != digest:
                yield f"{name} has changed since it was saved (SHA-256)"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"
