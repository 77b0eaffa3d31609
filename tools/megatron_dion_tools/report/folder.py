"""Reads run directories."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_dion.megatron.run_directory import Record, read_metrics
from megatron_dion.optimizer.diagnostics import Snapshot, read_diagnostics
from megatron_dion_tools.convergence.curves import LOSS
from megatron_dion_tools.errors import ToolError

_LONGEST_MEAN = 50


class Route(NamedTuple):
    """A line of routing.tsv: a logical matrix, or a parameter that is not split into matrices.

    The rank is that of the matrix's updates, and 0 without Dion; `reason` says why this optimizer.
    """

    name: str
    size: tuple[int, ...]
    optimizer: str
    reason: str
    rank: int


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: The run directory.
        config: config.json.
        records: metrics.jsonl.
        starts: starts.jsonl, a line for each start of the run.
        routes: routing.tsv; empty without Dion.
        diagnostics: The diagnostics in metrics.jsonl; empty without `--dion-log-interval`.
        is_cut: Whether the last line of metrics.jsonl is incomplete.
    """

    path: Path
    config: Record
    records: list[Record]
    starts: list[Record]
    routes: list[Route]
    diagnostics: list[Snapshot]
    is_cut: bool

    @cached_property
    def training(self) -> list[Record]:
        """The records of training iterations."""
        return [record for record in self.records if record["kind"] == "train"]

    @property
    def resumed_after(self) -> list[int]:
        """The iterations after which the run was resumed in this folder."""
        return [s["iteration"] for s in self.starts if s["iteration"] in self.elapsed]

    @cached_property
    def elapsed(self) -> dict[int, float]:
        """Seconds that all iterations up to each one took together, without evaluations."""
        sums = accumulate(record["iteration_seconds"] for record in self.training)
        return {r["iteration"]: sum_ for r, sum_ in zip(self.training, sums, strict=True)}

    @property
    def settled(self) -> list[tuple[Record, int]]:
        """Iterations with their tokens, but for the first of each start, which sets things up."""
        starts = {start["iteration"] for start in self.starts}
        return [
            (record, record["tokens"] - before["tokens"])
            for before, record in pairwise(self.training)
            if before["iteration"] not in starts
        ]

    @property
    def speeds(self) -> dict[int, float]:
        """Tokens per second by iteration."""
        return {r["iteration"]: tokens / r["iteration_seconds"] for r, tokens in self.settled}

    def curve(self, name: str, kind: str = "train") -> dict[int, float]:
        """A quantity by iteration, of the records of one kind that have it."""
        values = ((r["iteration"], r.get(name)) for r in self.records if r["kind"] == kind)
        return {iteration: value for iteration, value in values if value is not None}

    @cached_property
    def loss(self) -> dict[int, float]:
        """The mean training loss by iteration, of losses that are finite."""
        return mean({i: loss for i, loss in self.curve(LOSS).items() if math.isfinite(loss)})

    @cached_property
    def validation(self) -> dict[str, dict[int, float]]:
        """Validation losses by iteration, for each set that has some: `""` if there is one set."""
        records = (record for record in self.records if record["kind"] == "validation")
        keys = dict.fromkeys(key for record in records for key in record if key.startswith(LOSS))
        curves = {key.removeprefix(LOSS): self.curve(key, "validation") for key in keys}
        return {name: curve for name, curve in curves.items() if curve}


def mean(curve: dict[int, float]) -> dict[int, float]:
    """Means over a twentieth of the curve, over 50 iterations at most, by their last iteration."""
    window = min(max(1, len(curve) // 20), _LONGEST_MEAN)
    means = np.convolve([*curve.values()], np.full(window, 1 / window), "valid") if curve else ()
    return dict(zip([*curve][window - 1 :], map(float, means), strict=True))


def read_folder(path: Path) -> RunFolder:
    """Read a run directory; every file but config.json may be missing.

    Raises:
        ToolError: The folder is no run directory, or a file in it is damaged.
    """
    if not (path / "config.json").is_file():
        raise ToolError(
            f"RUN {path}: no config.json, so no run has started in it: give what was given to"
            " pretrain_gpt.py's --run-dir, or look at its output"
        )
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
    return Route(name, lengths, line["optimizer"], line["reason"], rank)
