"""The files of a run: config.json, routing.tsv, metrics.jsonl, starts.jsonl and loss.png."""

import argparse
import enum
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_dion

Record = dict[str, Any]


def write_config(
    run_dir: Path, args: argparse.Namespace, argv: Sequence[str], defaults: Mapping[str, Any]
) -> None:
    """Write config.json: what was asked for, what it resolved to, and with which software.

    Args:
        run_dir: Its folder, which is there.
        args: Every argument as resolved.
        argv: The command line.
        defaults: What every argument is when nobody sets it.
    """
    installed = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    config = {
        "command_line": [sys.argv[0], *argv],
        "platform": args.device,
        "world_size": args.world_size,
        "versions": installed
        | {"megatron_dion": megatron_dion.__version__, "python": platform.python_version()},
        "git_revision": git_revision(Path(megatron_dion.__file__).parent),
        "arguments": vars(args),
        "defaults": dict(defaults),
    }
    replace_file(run_dir / "config.json", json.dumps(config, indent=2, default=_plain) + "\n")


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


def _plain(value: Any) -> Any:
    """Say as JSON what argparse namespaces hold besides JSON's own types."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


class MetricsFile:
    """metrics.jsonl, or starts.jsonl: one JSON object per line, each of them with an iteration.

    Args:
        path: The file; its folder is made.
        iterations_done: Iterations behind the checkpoint from which the run starts. What an earlier
            run wrote beyond them is dropped, since it will be done again.
    """

    def __init__(self, path: Path, iterations_done: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        records = read_metrics(path)
        earlier = [record for record in records if record["iteration"] <= iterations_done]
        replace_file(path, "".join(_line(record) for record in earlier))
        self.dropped = len(records) - len(earlier)

    def append(self, record: Record) -> None:
        """Add one line; it is on disk when the call returns."""
        with self.path.open("a") as file:
            file.write(_line(record))


def read_metrics(path: Path) -> list[Record]:
    """Read a metrics file, without the last line if a killed process left it unfinished."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
