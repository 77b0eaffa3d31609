"""Reads a run directory."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from megatron_dion.megatron.run_directory import Record, read_metrics
from megatron_dion.optimizer.diagnostics import Snapshot, read_diagnostics
from megatron_dion_tools.errors import ToolError


class Route(NamedTuple):
    """A line of routing.tsv: a logical matrix, or a parameter that is not split into matrices.

    The rank is that of the matrix's updates, and 0 without Dion; `reason` says why this optimizer.
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
        path: The run directory.
        config: config.json.
        records: metrics.jsonl.
        training: Those of training iterations.
        starts: starts.jsonl, a line for each start of the run.
        routes: routing.tsv; empty without Dion.
        diagnostics: The diagnostics in metrics.jsonl; empty without `--dion-log-interval`.
        is_cut: Whether the last line of metrics.jsonl is incomplete.
    """

    path: Path
    config: Record
    records: list[Record]
    training: list[Record]
    starts: list[Record]
    routes: list[Route]
    diagnostics: list[Snapshot]
    is_cut: bool

    @property
    def resumed_after(self) -> list[int]:
        """The iterations after which the run was resumed in this folder."""
        done = {record["iteration"] for record in self.training}
        return [s["iteration"] for s in self.starts if s["iteration"] in done]


def read_folder(path: Path) -> RunFolder:
    """Read a run directory; every file but config.json may be missing.

    Raises:
        ToolError: The folder is no run directory, or a file in it is damaged.
    """
    if not (path / "config.json").is_file():
        raise ToolError(
            f"RUN_DIR {path}: no config.json, so no run has started in it: give what was given to"
            " pretrain_gpt.py's --run-dir, or look at its output"
        )
    metrics = path / "metrics.jsonl"
    records = _read(metrics, _records)
    return RunFolder(
        path=path,
        config=_read(path / "config.json", _config),
        records=records,
        training=[record for record in records if record["kind"] == "train"],
        starts=_read(path / "starts.jsonl", read_metrics),
        routes=_read(path / "routing.tsv", _routes),
        diagnostics=_read(metrics, lambda _: read_diagnostics(records)),
        is_cut=metrics.exists() and metrics.read_text()[-1:] not in ("", "\n"),
    )


def _read[T](path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ToolError(
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
    name, rank = line["matrix"] or line["parameter"], int(line["rank"] or 0)
    lengths = tuple(int(length) for length in size if length)
    return Route(name, line["parameter"], lengths, line["optimizer"], line["reason"], rank)
