"""What the steps of `megatron-dion data` share: files made once, and reading documents."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dion_tools.errors import ToolError


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_once(
    manifest: Path, recipe: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]]
) -> bool:
    """Make a set of files, unless they are there, were made alike and have not changed.

    An interruption leaves what was there before: files move to their place when all are written,
    and their manifest, which has their hashes, comes last.

    Args:
        manifest: Path of the JSON manifest; the files appear in its folder.
        recipe: All that decides what is in the files.
        write: Writes the files to a folder and returns facts about them for the manifest.

    Returns:
        False if the files were there.
    """
    if _is_current(manifest, recipe):
        return False
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=manifest.parent, prefix=".partial-") as temporary:
        folder = Path(temporary)
        facts = write(folder)
        hashes = {file.name: sha256_of_file(file) for file in sorted(folder.iterdir())}
        content = {**facts, "recipe": recipe, "files": hashes}
        text = json.dumps(content, indent=2) + "\n"
        (folder / manifest.name).write_text(text, encoding="utf-8")
        # The manifest goes first and comes last: it never vouches for a mixture of old and new.
        manifest.unlink(missing_ok=True)
        for name in [*hashes, manifest.name]:
            os.replace(folder / name, manifest.parent / name)
    return True


def _is_current(manifest: Path, recipe: Mapping[str, Any]) -> bool:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = {manifest.parent / name: expected for name, expected in content["files"].items()}
        return content["recipe"] == recipe and all(
            sha256_of_file(path) == expected for path, expected in files.items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # a file is missing, or the manifest is damaged


def read_documents(paths: Sequence[Path], key: str) -> Iterator[tuple[str, str]]:
    """Yield the documents of text and JSON-lines files, in order, but for empty ones.

    Each comes behind its place, `FILE:LINE`.

    A `.txt` file is one document. Every other file has one JSON object per line, or a blank line,
    and `key` is that of the text in each object.

    Raises:
        ToolError: A file cannot be read as such, or there is no text in any of them.
    """
    has_text = False
    for path in paths:
        is_text = path.suffix == ".txt"
        with path.open("rb") as file:
            for number, content in enumerate([file.read()] if is_text else file, start=1):
                place = f"{path}:{number}"
                try:
                    text = content.decode() if is_text else _text_of_line(content, key)
                    text.encode()  # JSON may hold halves of characters, which are no text
                except (ValueError, RecursionError) as error:
                    raise ToolError(f"{place}: not a document ({error})") from error
                if text:
                    has_text = True
                    yield place, text
    if not has_text:
        raise ToolError(f"--input {' '.join(map(str, paths))}: there is no text in it")


def _text_of_line(line: bytes, key: str) -> str:
    content = json.loads(line) if line.strip() else {key: ""}
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        raise ValueError(f"no object of JSON with a text under {key!r}")
    return str(content[key])
