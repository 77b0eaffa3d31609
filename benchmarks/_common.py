"""What the benchmarks share: the machine, worlds, interleaved measurements, tables and JSON."""

import argparse
import gc
import json
import logging
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dion.platforms import DEVICES, resolve_device
from megatron_dion_tools.convergence.environment import describe
from megatron_dion_tools.local.world import gloo_world

Row = Mapping[str, str | bool | int | float | None]
"""A row of a table, by column; units are in the columns' names."""


def make_parser(
    description: str | None, repeats: int, devices: Sequence[str] = DEVICES
) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have.

    Args:
        description: the program's docstring.
        repeats: default number of measurements of each case.
        devices: what it can measure, by default the first.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each case")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where results go, too")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, one process")
    parser.add_argument("--device", choices=devices, default=devices[0])
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses, resolves `--device`, and sets the number of threads."""
    args = parser.parse_args(argv)
    args.device = resolve_device(args.device)
    torch.set_num_threads(args.threads)
    return args


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        run: what is measured.
        prepare: called before each measurement, and not measured.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass
class Timing:
    """Measurements of a case, one for each round.

    Attributes:
        wall: seconds that passed.
        processor: seconds of processor time of this process, all of its threads.
    """

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def cost(self, device: str) -> list[float]:
        """What ratios compare: processor time, which others on the machine disturb least.

        Of a GPU's work only wall time is known.
        """
        return self.processor if device == "cpu" else self.wall


@dataclass(frozen=True)
class Summary:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def summary(values: Sequence[float]) -> Summary:
    """Median and quartiles of some values."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Median and quartiles of the ratios of measurements of the same rounds."""
    return summary([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleaved(cases: Mapping[str, Case], repeats: int) -> dict[str, Timing]:
    """Measures cases in turns, A B C A B C ..., so that drift of the machine hits all alike.

    A first round is not counted. Within a process group all ranks must call it with the same
    cases; they start each measurement together.
    """
    timings = {name: Timing() for name in cases}
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats + 1):
            for name, case in cases.items():
                case.prepare()
                wall, processor = _measure(case.run)
                if number > 0:
                    timings[name].wall.append(wall)
                    timings[name].processor.append(processor)
    finally:
        gc.enable()
    return timings


def _measure(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall and of processor time."""
    _synchronize()
    if dist.is_initialized():
        dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    _synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # not run here
        torch.cuda.synchronize()


def in_world(size: int, function: Callable[..., Any], *args: Any) -> list[Any] | None:
    """Calls `function(*args)` on each rank of a process group; returns the results by rank.

    Under torchrun its ranks are the group, with NCCL where there is a GPU (not run here), and all
    of them get the results; None if their number is not `size`. Otherwise ranks are forked, with
    gloo and one thread each.
    """
    if not is_under_torchrun():
        return gloo_world(size, function, *args)
    if int(os.environ["WORLD_SIZE"]) != size:
        return None
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend_of(resolve_device("auto")))
    results: list[Any] = [None] * size
    dist.all_gather_object(results, function(*args))
    return results


def preload_megatron() -> None:
    """On a CPU, make this process able to import Megatron, and a parent of ranks that train."""
    from megatron_dion_tools.local.preload import preload

    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preload()
    logging.disable(logging.NOTSET)


def is_under_torchrun() -> bool:
    """Whether this process is one rank of several."""
    return "RANK" in os.environ


def backend_of(device: str) -> str:
    """The backend of torch.distributed for a device."""
    return "nccl" if device == "cuda" else "gloo"


@dataclass(frozen=True)
class Goal:
    """What a figure ought to be.

    Attributes:
        name: of the figure.
        value: what was measured.
        limit: the most it should be.
    """

    name: str
    value: float
    limit: float

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit


def largest(rows: Sequence[Row], column: str) -> float | None:
    """The largest figure in a column, None if there is none."""
    return max((float(value) for row in rows if (value := row[column]) is not None), default=None)


def _without_folder(word: str) -> str:
    """Of an absolute path, which is of this machine only, the name."""
    return Path(word).name if Path(word).is_absolute() else word


def report(
    args: argparse.Namespace,
    tables: Mapping[str, Sequence[Row]],
    goals: Sequence[Goal] = (),
) -> None:
    """Prints tables and goals, and writes them with the machine to `--output`, on one rank.

    Args:
        args: what `parse` returned.
        tables: rows by the table's name; those without rows are left out.
        goals: what is aimed at.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    tables = {name: rows for name, rows in tables.items() if rows}
    for name, rows in tables.items():
        print(f"\n{name}\n{table(rows)}")
    for goal in goals:
        verdict = "met" if goal.is_met else "NOT MET"
        print(f"goal: {goal.name}: {goal.value:.3g}, at most {goal.limit:g}: {verdict}")
    if args.output is not None:
        content = {
            "command": [Path(sys.argv[0]).stem, *map(_without_folder, sys.argv[1:])],
            "options": {key: value for key, value in vars(args).items() if key != "output"},
            "machine": machine(args.device),
            "tables": tables,
            "goals": [{**asdict(goal), "is_met": goal.is_met} for goal in goals],
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, default=str) + "\n"
        args.output.write_text(text, encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Rows in aligned columns, which are those of the first row."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: str | bool | int | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: str) -> dict[str, str | int | None]:
    """Processor, cores, threads, libraries, device."""
    return {
        **{name: value for name, value in describe(()).items() if value is not None},
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "blas": _blas(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "backend": backend_of(device),
    }


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def wall_is_meaningful(ranks: int, device: str) -> bool:
    """Whether ranks run at the same time, not in turns on fewer cores."""
    return ranks <= cores() or device == "cuda"


def _blas() -> str:
    """The library of matrix products, as torch was built."""
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found[1] if found else "unknown"
