"""What there is in a run directory."""

import csv
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from megatron_dion.error_line import PREFIX
from megatron_dion.megatron.run_directory import Record, Session, read_metrics, sessions


class ReportError(Exception):
    """There is nothing to report on; the message says what to do."""


@dataclass(frozen=True)
class Route:
    """A line of routing.tsv: a logical matrix, or a parameter of the scalar optimizer.

    Attributes:
        parameter: its name.
        shape: of the parameter.
        optimizer: that updates it.
        reason: why.
        matrix: name of the logical matrix; empty if it is none.
        size: rows and columns of the matrix.
        rank: of its updates.
    """

    parameter: str
    shape: tuple[int, ...]
    optimizer: str
    reason: str
    matrix: str = ""
    size: tuple[int, ...] = ()
    rank: int = 0

    @property
    def name(self) -> str:
        return self.matrix or self.parameter

    @property
    def numel(self) -> int:
        return prod(self.size or self.shape)


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: the run directory.
        config: config.json.
        records: metrics.jsonl.
        starts: starts.jsonl, a line for each time that the run was started, as far as what it did
            then was kept.
        routes: routing.tsv; empty without Dion.
        is_cut: whether the last line of metrics.jsonl is half a line.
    """

    path: Path
    config: Record
    records: list[Record]
    starts: list[Record]
    routes: list[Route]
    is_cut: bool

    @cached_property
    def arguments(self) -> Namespace:
        return Namespace(**self.config["arguments"])

    @cached_property
    def training(self) -> list[Record]:
        return self.of_kind("train")

    @cached_property
    def sessions(self) -> list[Session]:
        return sessions(self.training, self.starts)

    @property
    def resumed_after(self) -> list[int]:
        """The iterations from which the run went on, in its own folder."""
        return [session.start["iteration"] for session in self.sessions[1:]]

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]


def read_folder(path: Path) -> RunFolder:
    """Read a run directory; all but config.json may be missing.

    Raises:
        ReportError: it is none, or a file is damaged.
    """
    if not (path / "config.json").is_file():
        raise ReportError(_no_run(path))
    metrics = path / "metrics.jsonl"
    return RunFolder(
        path=path,
        config=_read(path / "config.json", _config),
        records=_read(metrics, _records),
        starts=_read(path / "starts.jsonl", read_metrics),
        routes=_read(path / "routing.tsv", _routes),
        is_cut=_is_cut(metrics),
    )


def _is_cut(path: Path) -> bool:
    text = path.read_text() if path.exists() else ""
    return not text.endswith("\n") and text != ""


def _no_run(path: Path) -> str:
    """Says which folder may have been meant."""
    if not path.is_dir():
        return f"RUN_DIR {path}: no such folder; give what was given to pretrain_gpt.py's --run-dir"
    runs = [found.parent for found in path.glob("*/config.json")]
    if runs:
        newest = max(runs, key=lambda run: (run / "config.json").stat().st_mtime)
        return f"RUN_DIR {path}: no config.json in it, but {len(runs)} folders with one: {newest}?"
    return f"RUN_DIR {path}: no config.json, so no run has started in it: {_why_none(path)}"


def _why_none(path: Path) -> str:
    """What `make train`'s log says, or where to look without one."""
    log = path / "train.log"
    if not log.is_file():
        return "what pretrain_gpt.py printed says why, if this is what --run-dir was given"
    lines = log.read_text(errors="replace").splitlines()
    error = next((line for line in lines if line.startswith(PREFIX)), None)
    return f"{log} says why" + ("" if error is None else f": {error.removeprefix(PREFIX)}")


def _read[T](path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} is damaged ({error!r}): mend it, or take it out of the folder"
        ) from error


def _config(path: Path) -> Record:
    config = json.loads(path.read_text())
    if not isinstance(config["arguments"], dict):
        raise ValueError("its arguments have no names")
    return dict(config)


def _records(path: Path) -> list[Record]:
    records = read_metrics(path)
    for record in records:
        record["kind"], record["iteration"]
    return records


def _routes(path: Path) -> list[Route]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_route(line) for line in csv.DictReader(file, delimiter="\t")]


def _route(line: dict[str, Any]) -> Route:
    shape = tuple(map(int, line["shape"].split("x"))) if line["shape"] else ()
    if not line["matrix"]:
        return Route(line["parameter"], shape, line["optimizer"], line["reason"])
    return Route(
        *(line["parameter"], shape, line["optimizer"], line["reason"], line["matrix"]),
        size=(int(line["rows"]), int(line["columns"])),
        rank=int(line["rank"]),
    )
