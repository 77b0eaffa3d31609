"""What the benchmarks share: flags, ranks, interleaved measurements, tables and JSON."""

import argparse
import atexit
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dion.platforms import resolve_device
from megatron_dion_tools.convergence.environment import describe
from megatron_dion_tools.local.world import gloo_world

Row = Mapping[str, str | int | float | None]
"""A row of a table, by column; units are in the columns' names."""


def make_parser(
    description: str | None, repeats: int, devices: Sequence[str] = ("auto", "cuda", "cpu")
) -> argparse.ArgumentParser:
    """Makes a parser with the flags that all benchmarks have.

    Args:
        description: the program's docstring.
        repeats: default number of measurements of each case.
        devices: what the program can measure; the first is the default.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each case")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write results here")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--threads", action=Gone, const="programs use one thread")
    return parser


class Gone(argparse.Action):
    """A flag that was removed: an error with what to use instead (`const`)."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str) -> None:
        super().__init__(option_strings, dest, "?", const, help=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(f"{self.option_strings[0]} is gone: {self.const}")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses flags, resolves `--device`, and lets torch use one thread."""
    args = parser.parse_args(argv)
    args.device = resolve_device(args.device)
    torch.set_num_threads(1)
    return args


@dataclass(frozen=True)
class Summary:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def summary(values: Sequence[float]) -> Summary:
    """Returns median and quartiles of some values."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Returns median and quartiles of the ratios of measurements of the same rounds."""
    return summary([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Measures cases in turns, A B C A B C ..., so that drift of the machine affects all alike.

    A first round is not counted. Within a process group all ranks must make this call with the same
    cases; they start each measurement together.

    Args:
        cases: what to run, by name.
        repeats: number of rounds.
        device: `cpu` or `cuda`.

    Returns:
        Milliseconds by case, one figure a round: processor time of this process on a CPU, because
        other processes disturb it least; wall time on a GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats + 1):
            for name, run in cases.items():
                milliseconds = 1e3 * _measure(run, device)
                if number > 0:
                    times[name].append(milliseconds)
    finally:
        gc.enable()
    return times


def _measure(run: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    _synchronize(device)
    if dist.is_initialized():
        dist.barrier()
    start = clock()
    run()
    _synchronize(device)
    return clock() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_world(size: int, function: Callable[..., Any], *args: Any) -> list[Any] | None:
    """Calls `function(*args)` on each rank of a process group.

    Under torchrun its ranks are the group, with NCCL where there is a GPU. Otherwise ranks are
    forked, with gloo and one thread each.

    Returns:
        The results by rank; None if torchrun started another number of ranks than `size`.
    """
    if "RANK" not in os.environ:
        return gloo_world(size, function, *args)
    if int(os.environ["WORLD_SIZE"]) != size:
        return None
    if not dist.is_initialized():
        has_gpu = resolve_device("auto") == "cuda"
        if has_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if has_gpu else "gloo")
        atexit.register(dist.destroy_process_group)  # or gloo aborts some processes at their exit
    results: list[Any] = [None] * size
    dist.all_gather_object(results, function(*args))
    return results


def report(args: argparse.Namespace, tables: Iterable[tuple[str, Sequence[Row]]]) -> None:
    """Prints tables as they come, and writes all so far to `--output` with the machine.

    Only the first rank does so.

    Args:
        args: what `parse` returned.
        tables: names and rows; a table without rows is left out.
    """
    content: dict[str, Any] = {
        "program": Path(sys.argv[0]).stem,
        "options": {key: value for key, value in vars(args).items() if key != "output"},
        "machine": {
            **describe(()),
            "cores": len(os.sched_getaffinity(0)),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        },
        "tables": {},
    }
    is_first = int(os.environ.get("RANK", 0)) == 0
    for name, rows in tables:
        if not rows or not is_first:
            continue
        print(f"\n{name}\n{table(rows)}", flush=True)
        content["tables"][name] = rows
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=1, default=str) + "\n"
            args.output.write_text(text, encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Returns rows in aligned columns, which are those of the first row."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
