"""How long does training stand still for a checkpoint, how long to load it, how large is it?

A small GPT is trained through pretrain_gpt.py; the calls of Megatron's `save_checkpoint` and
`load_checkpoint` are timed on the first rank. Of an asynchronous save that is what training waits
for; the files are written behind it.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._common import Row, make_parser, parse, report, summary
from benchmarks._models import Topology
from benchmarks._training import (
    OPTIMIZERS,
    add_model_flags,
    model_flags,
    prepare,
    shape_of,
    train,
)
from megatron_dion_tools.local.runs import Run

# In the layout that it saves by default, 0.19.2 cannot load the state of float32 weights.
_ADAMW = (*OPTIMIZERS["AdamW"], "--dist-ckpt-optim-fully-reshardable")
CASES = {
    "AdamW": _ADAMW,
    "Dion 1/4": OPTIMIZERS["Dion 1/4"],
    "AdamW, asynchronous": (*_ADAMW, "--async-save"),
    "Dion 1/4, asynchronous": (*OPTIMIZERS["Dion 1/4"], "--async-save"),
}
TIMES = "checkpoint_times.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each kind of checkpoint."""
    args = _parse(argv)
    prepare(args.device)
    measured = {name: Measured() for name in args.cases}
    for _ in range(args.repeats):
        for name, found in measured.items():
            with tempfile.TemporaryDirectory() as folder:
                _save_and_load(CASES[name], Path(folder), args, found)
    report(args, {"checkpoint": _rows(measured, args)})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3)
    add_model_flags(parser, hidden=256, layers=4)
    parser.add_argument("--processes", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--saves", type=int, default=2, help="checkpoints of each run")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    return parse(parser, argv)


@dataclass
class Measured:
    """Of one kind of checkpoint: seconds of each save and load, bytes of the files."""

    save: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    nbytes: list[float] = field(default_factory=list)


def _save_and_load(
    optimizer: Sequence[str], folder: Path, args: argparse.Namespace, found: Measured
) -> None:
    """Trains and saves after each iteration; loads the last checkpoint in another run."""
    checkpoints = folder / "checkpoints"
    flags = [*model_flags(args, Topology(dp=args.processes)), *optimizer]
    flags += ["--ckpt-format", "torch_dist"]
    flags += ["--train-iters", str(args.saves), "--save-interval", "1"]
    for name, more in (("save", "--save"), ("load", "--load")):
        run_flags = (*flags, more, str(checkpoints))
        run = Run(name, folder / name, run_flags, args.processes, patch=f"{__file__}:watch")
        train(run)
        times = [json.loads(line) for line in (run.folder / TIMES).read_text().splitlines()]
        getattr(found, name).extend(seconds for kind, seconds in times if kind == name)
    last = max(checkpoints.glob("iter_*"))
    found.nbytes.append(sum(file.stat().st_size for file in last.rglob("*") if file.is_file()))


def watch() -> None:
    """On a rank, before training: time what training calls, and write it into the run's folder."""
    from megatron.training import training

    for name in ("save", "load"):
        function = f"{name}_checkpoint"
        setattr(training, function, _timed(name, getattr(training, function)))


def _timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **options: Any) -> Any:
        from megatron.training import get_args

        started = time.perf_counter()
        result = function(*args, **options)
        seconds = time.perf_counter() - started
        if get_args().rank == 0:
            with (Path(get_args().run_dir) / TIMES).open("a") as file:
                file.write(json.dumps([name, seconds]) + "\n")
        return result

    return timed


def _rows(measured: Mapping[str, Measured], args: argparse.Namespace) -> list[Row]:
    parameters = shape_of(args).parameters
    rows: list[Row] = []
    for name, found in measured.items():
        nbytes = summary(found.nbytes).median
        rows.append(
            {
                "checkpoint": name,
                "parameters_M": parameters / 1e6,
                "saves": len(found.save),
                "save_ms": 1e3 * summary(found.save).median,
                "save_low": 1e3 * summary(found.save).low,
                "save_high": 1e3 * summary(found.save).high,
                "load_ms": 1e3 * summary(found.load).median,
                "load_low": 1e3 * summary(found.load).low,
                "load_high": 1e3 * summary(found.load).high,
                "MB": nbytes / 1e6,
                "bytes_per_parameter": nbytes / parameters,
            }
        )
    return rows


if __name__ == "__main__":
    main()
