"""The three steps of checking that all ranks see one and the same folder.

Rank 0 writes a file with a name that was never used (a file server's client may remember for a
minute that a file is not there), all ranks read it, rank 0 removes it.
"""

from pathlib import Path

from megatron_dion_tools.doctor.findings import Finding, failed, ok


def write(folder: Path, word: str) -> Finding:
    """On rank 0: leave a file."""
    try:
        _file(folder, word).write_text(word)
    except OSError as error:
        return failed(f"{folder}: {error.strerror}", "make it, writable for this user")
    return ok(f"{folder} can be written to")


def read(folder: Path, word: str) -> Finding:
    """On all ranks: look for the file that rank 0 left."""
    try:
        found = _file(folder, word).read_text()
    except OSError as error:
        return failed(
            f"rank 0's file is not seen in {folder}: {error.strerror}",
            "mount the same file system on every node, and into every container",
        )
    if found != word:
        return failed(f"rank 0's file has other content in {folder}", "look at the file system")
    return ok(f"{folder} is one and the same")


def remove(folder: Path, word: str) -> Finding:
    """On rank 0: take the file away again."""
    _file(folder, word).unlink(missing_ok=True)
    return ok("removed")


def _file(folder: Path, word: str) -> Path:
    return folder / f".doctor-{word}"
