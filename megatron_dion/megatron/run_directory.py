"""The files of a run: config.json, routing.tsv, metrics.jsonl and starts.jsonl."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_dion

CONFIG, METRICS, STARTS = "config.json", "metrics.jsonl", "starts.jsonl"

Record = dict[str, Any]


def write_config(run_dir: Path, args: argparse.Namespace, defaults: Record) -> None:
    """Write config.json: every argument as resolved, its default, and the software of the run."""
    installed = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    config = {
        "command_line": sys.argv,
        "platform": args.device,
        "world_size": args.world_size,
        "versions": installed
        | {"megatron_dion": megatron_dion.__version__, "python": platform.python_version()},
        "git_revision": git_revision(Path(megatron_dion.__file__).parent),
        "arguments": vars(args),
        "defaults": defaults,
    }
    replace_file(run_dir / CONFIG, json.dumps(config, indent=2, default=str) + "\n")


def git_revision(folder: Path) -> str | None:
    """Name the commit that `folder` is at, with `-dirty` where it was edited; None outside git."""
    # Without tags, `describe` names the commit by its hash alone.
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(folder), *describe]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def replace_file(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def set_aside(path: Path, iterations_done: float) -> None:
    """Move what a run wrote after these iterations, which it does again, to NAME.replaced.jsonl.

    The file is metrics.jsonl, or starts.jsonl: JSON objects, each of them with an iteration. Of
    its content, only a last line that a killed process left unfinished is lost.
    """
    kept: list[Record] = []
    for record in _read(path):
        if record["iteration"] > iterations_done:
            append(path.with_suffix(".replaced.jsonl"), record)
        else:
            kept.append(record)
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if path.exists() and path.read_text() != text:  # another run may be writing to it
        replace_file(path, text)


def append(path: Path, record: Record) -> None:
    """Add one line; it is on disk when the call returns."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[Record]:
    """Read a metrics file in the order of iterations, without a last line that is unfinished.

    Raises:
        ValueError: A line is damaged; the message names it.
    """
    # An evaluation may come late.
    return sorted(_read(path), key=lambda record: record["iteration"])


def _read(path: Path) -> list[Record]:
    records = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["iteration"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}:{number} is damaged: mend or remove the line") from error
        records.append(record)
    return records
