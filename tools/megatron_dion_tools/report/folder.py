"""Reads a run directory."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from megatron_dion.error_line import PREFIX
from megatron_dion.megatron.run_directory import Record, read_metrics
from megatron_dion.optimizer.diagnostics import Snapshot, read_diagnostics
from megatron_dion_tools.errors import ToolError


class Route(NamedTuple):
    """A line of routing.tsv: a logical matrix, or a parameter that is not split into matrices.

    Attributes:
        name: Of the logical matrix, or of the parameter.
        parameter: Its name.
        size: Rows and columns of the matrix, or the shape of the parameter.
        optimizer: The optimizer that updates it.
        reason: Why this optimizer.
        rank: Of the matrix's updates; 0 without Dion.
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


class Session(NamedTuple):
    """What a run did from one of its starts to the next.

    Attributes:
        start: The line of starts.jsonl.
        iterations: Training records, one or more, each with the tokens of its iteration.
    """

    start: Record
    iterations: list[tuple[Record, int]]

    @property
    def settled(self) -> list[tuple[Record, int]]:
        """All iterations but the first, in which memory and connections are set up."""
        return self.iterations[1:]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.iterations)

    @property
    def tokens_per_second(self) -> float:
        """The throughput of settled iterations; of the only one, if there is one."""
        timed = self.settled or self.iterations
        return sum(tokens for _, tokens in timed) / sum(r["iteration_seconds"] for r, _ in timed)


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: The run directory.
        config: config.json.
        records: metrics.jsonl.
        training: Those of training iterations.
        starts: starts.jsonl, a line for each start of the run.
        sessions: The iterations of each start that has completed any.
        routes: routing.tsv; empty without Dion.
        diagnostics: The diagnostics in metrics.jsonl; empty without `--dion-log-interval`.
        is_cut: Whether the last line of metrics.jsonl is incomplete.
    """

    path: Path
    config: Record
    records: list[Record]
    training: list[Record]
    starts: list[Record]
    sessions: list[Session]
    routes: list[Route]
    diagnostics: list[Snapshot]
    is_cut: bool

    @property
    def resumed_after(self) -> list[int]:
        """The iterations after which the run was resumed in this folder."""
        return [session.start["iteration"] for session in self.sessions[1:]]


def read_folder(path: Path) -> RunFolder:
    """Read a run directory; every file but config.json may be missing.

    Raises:
        ToolError: The folder is no run directory, or a file in it is damaged.
    """
    if not (path / "config.json").is_file():
        raise ToolError(f"RUN_DIR {path}: {_why_no_run(path)}")
    metrics = path / "metrics.jsonl"
    records = _read(metrics, _records)
    starts = _read(path / "starts.jsonl", read_metrics)
    training = [record for record in records if record["kind"] == "train"]
    return RunFolder(
        path=path,
        config=_read(path / "config.json", _config),
        records=records,
        training=training,
        starts=starts,
        sessions=sessions(training, starts),
        routes=_read(path / "routing.tsv", _routes),
        diagnostics=_read(metrics, lambda _: read_diagnostics(records)),
        is_cut=metrics.exists() and metrics.read_text()[-1:] not in ("", "\n"),
    )


def sessions(training: Sequence[Record], starts: Sequence[Record]) -> list[Session]:
    """Divide training records by the starts of the run.

    Args:
        training: Training records; their tokens are counted from the beginning of the model, which
            a start may have loaded from another run.
        starts: The lines of starts.jsonl; a start without an iteration makes no session.
    """
    divided: list[Session] = []
    began = {start["iteration"]: start for start in starts}
    tokens = 0
    for record in training:
        start = began.get(record["iteration"] - 1)
        if start is not None or not divided:
            start = start or {"iteration": record["iteration"] - 1}
            tokens = start.get("tokens", tokens)
            divided.append(Session(start, []))
        divided[-1].iterations.append((record, record["tokens"] - tokens))
        tokens = record["tokens"]
    return divided


def _why_no_run(path: Path) -> str:
    """Say why the run did not begin, as its log has it."""
    if not path.is_dir():
        return "no such folder; give what was given to pretrain_gpt.py's --run-dir"
    log = path / "train.log"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    reasons = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    where = f"{log} says why" if lines else "the output of pretrain_gpt.py says why"
    return f"no config.json, so no run has started in it: {': '.join([where, *reasons[:1]])}"


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
