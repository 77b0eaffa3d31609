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
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_dion_tools.data.files import make_once, sha256_of_file
from megatron_dion_tools.errors import ToolError

VALIDATION_SHARE = 0.05


class Pin(NamedTuple):
    """An exact release of a package and the SHA-256 of its source archive."""

    package: str
    version: str
    sha256: str


DJANGO = Pin("Django", "5.2.8", "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f")


def fetch_corpus(output: Path, archive: Path | None = None, pin: Pin = DJANGO) -> bool:
    """Write `train.jsonl`, `validation.jsonl` and the manifest `corpus.json` into a folder.

    The text comes from a local copy of the source archive; without one it is downloaded. False if
    the right files were there already.

    Raises:
        ToolError: The archive cannot be had, is not the pinned one or holds no documents.
    """

    def write(folder: Path) -> Mapping[str, Any]:
        splits: dict[str, list[str]] = {"train": [], "validation": []}
        with tempfile.TemporaryDirectory() as downloads:
            texts = read_archive(archive or download_archive(pin, Path(downloads)), pin)
        for name, text in texts.items():
            line = json.dumps({"text": text, "name": name}) + "\n"
            splits["validation" if is_held_out(name) else "train"].append(line)
        for split, lines in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        return {"documents": {split: len(lines) for split, lines in splits.items()}}

    recipe = {**pin._asdict(), "validation_share": VALIDATION_SHARE}
    return make_once(output / "corpus.json", recipe, write)


def download_archive(pin: Pin, folder: Path) -> Path:
    """Download the pinned source archive with pip, from the index that pip is configured for.

    Raises:
        ToolError: pip fails; the error has pip's reason.
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
        reason = " ".join(finished.stderr.partition("ERROR:")[2].split())
        raise ToolError(f"pip download failed: {reason or finished.stderr.strip()}")
    [archive] = folder.glob("*.tar.gz")
    return archive


def read_archive(archive: Path, pin: Pin) -> dict[str, str]:
    """Return the texts of `docs/**/*.txt` in an archive by their sorted names.

    Raises:
        ToolError: The archive is not the pinned one or holds no documents.
    """
    sha256 = sha256_of_file(archive)
    if sha256 != pin.sha256:
        raise ToolError(
            f"{archive}: wrong sha256: expected {pin.sha256}, got {sha256}: get the source archive"
            f" of {pin.package} {pin.version} again, from a place that can be trusted"
        )
    texts = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar.getmembers():
                _, *parts = PurePosixPath(member.name).parts  # without the archive's top folder
                file = tar.extractfile(member)
                if file and parts[:1] == ["docs"] and parts[-1].endswith(".txt"):
                    texts["/".join(parts)] = file.read().decode("utf-8")
    except (tarfile.TarError, EOFError) as error:
        raise ToolError(f"{archive}: not a readable .tar.gz archive ({error})") from error
    if not texts:
        raise ToolError(f"{archive}: no docs/**/*.txt files in it")
    return dict(sorted(texts.items()))


def is_held_out(name: str) -> bool:
    """Tell whether a document is for validation; its name alone decides."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8]) < VALIDATION_SHARE * 2**64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--archive", type=Path, help="local copy of the source archive (default: download it)"
    )


def run(args: argparse.Namespace) -> None:
    """Fetch, or reuse what is there."""
    made = fetch_corpus(args.output, args.archive)
    print(f"corpus: {'wrote' if made else 'reusing'} {args.output / 'corpus.json'}")
