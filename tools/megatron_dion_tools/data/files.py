"""What the steps of `megatron-dion data` share: manifests, and reading documents."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.terminal import progress_bar


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staged_output(
    manifest: Path, recipe: Mapping[str, Any]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write a set of files and their manifest so that an interruption leaves none half written.

    The block writes into the folder it is given. When it ends without an exception, the files move
    next to `manifest`, which is then written with their hashes; otherwise they are removed.

    Args:
        manifest: Path of the JSON manifest; the files appear in its folder.
        recipe: What the files were made from, for `is_current`.

    Yields:
        The folder to write to, and a dictionary of facts to put into the manifest.
    """
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=manifest.parent, prefix=".partial-") as temporary:
        folder, facts = Path(temporary), dict[str, Any]()
        yield folder, facts
        hashes = {file.name: sha256_of_file(file) for file in sorted(folder.iterdir())}
        staged_manifest = folder / manifest.name
        content = {**facts, "recipe": recipe, "files": hashes}
        staged_manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # The manifest goes first and comes last: it never vouches for a mixture of old and new.
        manifest.unlink(missing_ok=True)
        for name in hashes:
            os.replace(folder / name, manifest.parent / name)
        os.replace(staged_manifest, manifest)


def is_current(manifest: Path, recipe: Mapping[str, Any]) -> bool:
    """Tell whether the files of a manifest were made by this recipe and are unchanged.

    Args:
        manifest: A manifest written by `staged_output`; it need not exist.
        recipe: What the files should have been made from.
    """
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        made_alike = content["recipe"] == recipe
        hashes: dict[str, str] = content["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return made_alike and all(
        (manifest.parent / name).is_file() and sha256_of_file(manifest.parent / name) == expected
        for name, expected in hashes.items()
    )


def read_documents(
    paths: Sequence[Path], keys: Sequence[str], description: str
) -> Iterator[dict[str, str]]:
    """Yield the documents of text and JSON-lines files, in order, with a progress bar.

    A `.txt` file is one document. Every other file holds one JSON object per line; blank lines are
    skipped.

    Args:
        paths: The input files.
        keys: The keys whose strings are wanted of each object.
        description: What the progress bar says.

    Raises:
        ToolError: If a file cannot be read as such, with the place of the fault.
    """
    total = sum(path.stat().st_size for path in paths)
    with progress_bar(description, total, unit="B") as bar:
        for path in paths:
            read = _read_text if path.suffix == ".txt" else _read_json_lines
            try:
                for document, size in read(path, keys):
                    yield document
                    bar.update(size)
            except UnicodeDecodeError as error:
                raise ToolError(f"{path}: not UTF-8 text ({error.reason})") from error


SizedDocument = tuple[dict[str, str], int]  # with its bytes in the file


def _read_text(path: Path, keys: Sequence[str]) -> Iterator[SizedDocument]:
    if len(keys) != 1:
        raise ToolError(f"{path}: a text file has one content, not --json-keys {' '.join(keys)}")
    yield {keys[0]: path.read_text(encoding="utf-8")}, path.stat().st_size


def _read_json_lines(path: Path, keys: Sequence[str]) -> Iterator[SizedDocument]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_json_line(line, keys, place=f"{path}:{number}"), len(line)


def _parse_json_line(line: bytes, keys: Sequence[str], place: str) -> dict[str, str]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ToolError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(content, dict):
        raise ToolError(f"{place}: not a JSON object")
    for key in keys:
        if key not in content:
            raise ToolError(f"{place}: no key {key!r} (there are: {', '.join(content) or 'none'})")
        if not isinstance(content[key], str):
            raise ToolError(f"{place}: the value of {key!r} is not a string")
    return {key: content[key] for key in keys}
