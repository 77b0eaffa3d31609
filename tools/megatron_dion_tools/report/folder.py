"""Reads a run directory."""

import csv
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from megatron_dion.error_line import PREFIX
from megatron_dion.megatron.run_directory import Record, read_metrics
from megatron_dion.optimizer.diagnostics import Snapshot, read_diagnostics
from megatron_dion_tools.report.sessions import Session, sessions


class ReportError(Exception):
    """The folder cannot be reported on; the message says what to do."""


@dataclass(frozen=True)
class Route:
    """A line of routing.tsv: a logical matrix, or a parameter that is not split into matrices.

    Attributes:
        name: of the logical matrix, or of the parameter.
        parameter: its name.
        size: rows and columns of the matrix, or the shape of the parameter.
        optimizer: the optimizer that updates it.
        reason: why this optimizer.
        rank: of the matrix's updates; 0 without Dion.
    """

    name: str
    parameter: str
    size: tuple[int, ...]
    optimizer: str
    reason: str
    rank: int

    @property
    def numel(self) -> int:
        return prod(self.size)


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: the run directory.
        config: config.json.
        records: metrics.jsonl.
        starts: starts.jsonl, a line for each start of the run.
        routes: routing.tsv; empty without Dion.
        diagnostics: the diagnostics in metrics.jsonl; empty without `--dion-log-interval`.
        is_cut: whether the last line of metrics.jsonl is incomplete.
    """

    path: Path
    config: Record
    records: list[Record]
    starts: list[Record]
    routes: list[Route]
    diagnostics: list[Snapshot]
    is_cut: bool

    @cached_property
    def arguments(self) -> Namespace:
        return Namespace(**self.config["arguments"])

    @cached_property
    def training(self) -> list[Record]:
        """The records of training iterations."""
        return [record for record in self.records if record["kind"] == "train"]

    @cached_property
    def sessions(self) -> list[Session]:
        """The iterations of each start that has completed any."""
        return sessions(self.training, self.starts)

    @property
    def resumed_after(self) -> list[int]:
        """The iterations after which the run was resumed in this folder."""
        return [session.start["iteration"] for session in self.sessions[1:]]


def read_folder(path: Path) -> RunFolder:
    """Read a run directory; every file but config.json may be missing.

    Raises:
        ReportError: the folder is no run directory, or a file in it is damaged.
    """
    if not (path / "config.json").is_file():
        raise ReportError(f"RUN_DIR {path}: {_why_no_run(path)}")
    metrics = path / "metrics.jsonl"
    records = _read(metrics, _records)
    return RunFolder(
        path=path,
        config=_read(path / "config.json", _config),
        records=records,
        starts=_read(path / "starts.jsonl", read_metrics),
        routes=_read(path / "routing.tsv", _routes),
        diagnostics=_read(metrics, lambda _: read_diagnostics(records)),
        is_cut=metrics.exists() and metrics.read_text()[-1:] not in ("", "\n"),
    )


def _why_no_run(path: Path) -> str:
    """Says which folder the user may have meant, or why the run did not begin."""
    if not path.is_dir():
        return "no such folder; give what was given to pretrain_gpt.py's --run-dir"
    if configs := list(path.glob("*/config.json")):
        newest = max(configs, key=lambda config: config.stat().st_mtime).parent
        return f"no config.json in it, but {len(configs)} folders with one: {newest}?"
    log = path / "train.log"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    reasons = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    where = f"{log} says why" if lines else "the output of pretrain_gpt.py says why"
    return f"no config.json, so no run has started in it: {': '.join([where, *reasons[:1]])}"


def _read[T](path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} is damaged ({error!r}): mend it, or take it out of the folder"
        ) from error


def _config(path: Path) -> Record:
    config: Record = json.loads(path.read_text())
    if not isinstance(config["arguments"], dict):
        raise ValueError("its arguments have no names")
    return config


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


def _route(line: dict[str, str]) -> Route:
    size = [line["rows"], line["columns"]] if line["matrix"] else line["shape"].split("x")
    return Route(
        name=line["matrix"] or line["parameter"],
        parameter=line["parameter"],
        size=tuple(int(length) for length in size if length),
        optimizer=line["optimizer"],
        reason=line["reason"],
        rank=int(line["rank"] or 0),
    )
