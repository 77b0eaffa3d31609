"""Fetch the pinned text corpus: the English documentation in Django's source archive.

The archive is checked by its SHA-256 before anything is taken from it. A second call verifies what
is there and reuses it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from megatron_dion_tools.data.files import is_current, sha256_of_file, staged_output
from megatron_dion_tools.errors import ToolError

VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Pin:
    """An exact release of a package and the hash of its source archive."""

    package: str
    version: str
    sha256: str


DJANGO = Pin(
    package="Django",
    version="5.2.8",
    sha256="23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
)


@dataclass(frozen=True)
class Document:
    """One text with its path inside the archive."""

    name: str
    text: str


def fetch_corpus(output: Path, pin: Pin, archive: Path | None = None) -> bool:
    """Write `corpus.jsonl`, `train.jsonl`, `validation.jsonl` and the manifest `corpus.json`.

    Args:
        output: The folder to write to.
        pin: The release the text comes from.
        archive: A local copy of the source archive; downloaded when None.

    Returns:
        False if the right files were there already.

    Raises:
        ToolError: If the archive cannot be had, is not the pinned one or holds no documents.
    """
    manifest = output / "corpus.json"
    recipe = {**asdict(pin), "validation_share": VALIDATION_SHARE}
    if is_current(manifest, recipe):
        return False
    documents = load_documents(pin, archive)
    splits = split_documents(documents)
    with staged_output(manifest, recipe) as (folder, facts):
        for name, members in splits.items():
            write_json_lines(folder / f"{name}.jsonl", members)
        facts["documents"] = {name: len(members) for name, members in splits.items()}
        facts["bytes"] = sum(len(document.text.encode()) for document in documents)
    return True


def load_documents(pin: Pin, archive: Path | None) -> list[Document]:
    """Return the documents of the pinned archive, from a local copy or the package index."""
    if archive is not None:
        return read_archive(archive, pin)
    with tempfile.TemporaryDirectory() as temporary:
        return read_archive(download_archive(pin, Path(temporary)), pin)


def download_archive(pin: Pin, folder: Path) -> Path:
    """Download the pinned source archive with pip, from the index pip is configured for.

    Raises:
        ToolError: If pip fails; its own reason is part of the message.
    """
    # pip runs an archive's build script to read its metadata, so pip must check the hash too.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", pin.package]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
    command += ["--disable-pip-version-check"]
    if not sys.stdout.isatty():
        command.append("--quiet")
    print(f"downloading the source archive of {pin.package} {pin.version}", flush=True)
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        raise ToolError(f"pip download failed: {pip_reason(finished.stderr)}")
    archives = [file for file in folder.iterdir() if file.name.endswith(".tar.gz")]
    if len(archives) != 1:
        raise ToolError(f"pip download left {len(archives)} .tar.gz files instead of one")
    return archives[0]


def pip_reason(stderr: str) -> str:
    """Return pip's error message on one line."""
    _, marker, message = stderr.partition("ERROR:")
    return " ".join((message if marker else stderr).split()) or "it gave no reason"


def read_archive(archive: Path, pin: Pin) -> list[Document]:
    """Return the `docs/**/*.txt` documents of an archive, sorted by name.

    Raises:
        ToolError: If the archive is not the pinned one or holds no documents.
    """
    check_sha256(archive, pin)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = sorted(filter(is_document, tar.getmembers()), key=lambda member: member.name)
            documents = [read_member(tar, member) for member in members]
    except (tarfile.TarError, EOFError) as error:
        raise ToolError(f"{archive}: not a readable .tar.gz archive ({error})") from error
    if not documents:
        raise ToolError(f"{archive}: no docs/**/*.txt files in it")
    return documents


def check_sha256(archive: Path, pin: Pin) -> None:
    """Raise `ToolError` unless the archive is the pinned one."""
    found = sha256_of_file(archive)
    if found != pin.sha256:
        raise ToolError(
            f"{archive}: wrong sha256: expected {pin.sha256}, found {found}. Nothing was written. "
            f"Get the source archive of {pin.package} {pin.version} again; if it still differs, "
            "the place it came from is not to be trusted."
        )


def is_document(member: tarfile.TarInfo) -> bool:
    """Tell whether an archive member is one of the documentation's text files."""
    path = PurePosixPath(member.name)
    return member.isfile() and path.parts[1:2] == ("docs",) and path.suffix == ".txt"


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Document:
    """Return one archive member as a document, named without the archive's top folder."""
    file = tar.extractfile(member)
    assert file is not None, "is_document admits regular files only"
    name = PurePosixPath(*PurePosixPath(member.name).parts[1:])
    return Document(str(name), file.read().decode("utf-8"))


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Return all documents and their split, decided by the names alone."""
    return {
        "corpus": list(documents),
        "train": [document for document in documents if not is_validation(document.name)],
        "validation": [document for document in documents if is_validation(document.name)],
    }


def is_validation(name: str) -> bool:
    """Tell whether a document is held out; the same on every machine and in every order."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8]) < VALIDATION_SHARE * 2**64


def write_json_lines(path: Path, documents: Sequence[Document]) -> None:
    """Write one JSON object per document."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "name": document.name}) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--archive", type=Path, help="local copy of the source archive (default: download it)"
    )


def run(options: argparse.Namespace) -> None:
    """Fetch, or reuse what is there."""
    made = fetch_corpus(options.output, DJANGO, options.archive)
    print(f"corpus: {'wrote' if made else 'reusing'} {options.output / 'corpus.json'}")
