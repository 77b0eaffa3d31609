"""Writes metrics.jsonl, whose series TensorBoard and W&B get too, and starts.jsonl."""

import inspect
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count, repeat
from pathlib import Path
from statistics import median
from typing import Any

from megatron.training import get_args
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_dion.megatron import patches
from megatron_dion.megatron.patches import Stock
from megatron_dion.megatron.run_directory import METRICS, STARTS, Record, append, set_aside
from megatron_dion.megatron.stopwatch import Stopwatch
from megatron_dion.optimizer.diagnostics import FIGURES, KIND, Snapshot, by_kind, to_record

# Megatron's name for the loss of a language model, and ours in metrics.jsonl.
LOSS_NAME, LOSS = "lm loss", "lm_loss"

_PARALLELISM = ("tensor_model", "pipeline_model", "context", "expert_model", "data")


class Recorder:
    """Stands around the functions of megatron's training loop, on the rank that knows the loss."""

    def __init__(self, run_dir: Path) -> None:
        self._metrics, self._starts = run_dir / METRICS, run_dir / STARTS
        self._optimizer: Any = None
        self._step_time = Stopwatch()
        self._optimizer_time = Stopwatch()
        self._evaluated: tuple[str, int] = ("", 0)  # the kind of data, and the iteration
        self._losses: Iterator[str] = repeat(LOSS)  # names of those that are evaluated next
        self._validated: dict[str, int] = {}  # the iteration of the last validation by loss
        set_aside(self._metrics, math.inf)  # a line that is cut off
        patches.wrap("train_step", self._time_step)
        patches.wrap("training_log", self._record_iteration)
        patches.wrap("evaluate_and_print_results", self._note_evaluation)
        patches.wrap("evaluate", self._record_evaluation)

    def append(self, record: Record) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard and W&B."""
        append(self._metrics, record)
        kind, iteration = record["kind"], record["iteration"]
        if kind != "train" or iteration % get_args().tensorboard_log_interval == 0:
            items = [(name, value) for name, value in record.items() if name != "iteration"]
            numbers = {f"{kind}/{n}": float(v) for n, v in items if isinstance(v, int | float)}
            _write(numbers, iteration)

    def _time_step(self, stock: Stock, *args: Any, **options: Any) -> Any:
        start = None
        if self._optimizer is None:
            start = _start()
            self._optimizer = _call(stock, args, options)["optimizer"]
            self._optimizer.step = self._optimizer_time.running()(self._optimizer.step)
        with self._step_time.running():
            result = stock(*args, **options)
        if start is not None:  # only now is an iteration done again
            set_aside(self._metrics, start["iteration"])
            # An earlier start from the same iteration has left nothing.
            set_aside(self._starts, start["iteration"] - 1)
            append(self._starts, start)
        return result

    def _record_iteration(self, stock: Stock, *args: Any, **options: Any) -> Any:
        logged = _call(stock, args, options)
        record = {
            "kind": "train",
            "iteration": logged["iteration"],
            LOSS: _number(logged["loss_dict"].get(LOSS_NAME)),
            "grad_norm": _number(logged["grad_norm"]),
            "lr": logged["learning_rate"],
            "tokens": _tokens_so_far(),
            "iteration_seconds": self._step_time.read(),
            "optimizer_seconds": self._optimizer_time.read(),
            "optimizer_bytes": getattr(self._optimizer, "exchanged_bytes_per_step", 0),
            "skipped": bool(logged["skipped_iter"]),
        }
        self.append(record)
        return stock(*args, **options)

    def _note_evaluation(self, stock: Stock, *args: Any, **options: Any) -> Any:
        call, run = _call(stock, args, options), get_args()
        kind = "test" if "test set" in call["prefix"] else "validation"
        self._evaluated = kind, call["iteration"]
        if run.multiple_validation_sets:  # named as Megatron's own curves
            self._losses = (f"{LOSS}-{name}" for name in run.validation_set_names or count())
        return stock(*args, **options)

    def _record_evaluation(self, stock: Stock, *args: Any, **options: Any) -> Any:
        losses, *others = stock(*args, **options)
        (kind, iteration), name = self._evaluated, next(self._losses)
        # Megatron evaluates once more after training, on other samples: the first one counts.
        is_repeated = kind == "validation" and iteration == self._validated.get(name)
        if LOSS_NAME in (losses or ()) and not is_repeated:
            self.append({"kind": kind, "iteration": iteration, name: _number(losses[LOSS_NAME])})
            self._validated[name] = iteration
        return losses, *others


def _start() -> Record:
    """What starts.jsonl says of this start of the run, once a checkpoint has been loaded."""
    args = get_args()
    sizes = [f"{name}_parallel_size" for name in _PARALLELISM]
    return {
        "iteration": args.iteration,
        "tokens": _tokens_so_far(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: getattr(args, name) for name in ("world_size", *sizes)},
    }


def _call(function: Stock, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return inspect.signature(function).bind(*args, **options).arguments


def _tokens_so_far() -> int:
    # A checkpoint replaces the counter, so it has to be read where Megatron keeps it.
    args = get_args()
    return int(args.consumed_train_samples * args.seq_length)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def log_diagnostics(interval: int, record: Callable[[Record], None] | None) -> None:
    """Measure the step of every N-th iteration. Every rank must do so, because all take part.

    The rank that writes metrics.jsonl gives the function that adds a line to it.
    """

    def measure(stock: Stock, *args: Any, **options: Any) -> Any:
        iteration = get_args().curr_iteration + 1  # the iteration that this step completes
        if iteration % interval:
            return stock(*args, **options)
        optimizer = _call(stock, args, options)["optimizer"]
        optimizer.diagnose_next_step()
        result = stock(*args, **options)
        if matrices := optimizer.gather_diagnostics():
            snapshot = Snapshot(iteration, tuple(matrices))
            if record is not None:
                record(to_record(snapshot))
            _write_curves(snapshot)
        return result

    patches.wrap("train_step", measure)


def _write_curves(snapshot: Snapshot) -> None:
    curves = {  # TensorBoard makes a section of what stands before a tag's first slash
        f"{KIND}-{figure}/{kind}/{statistic.__name__}": statistic(values)
        for figure in FIGURES
        for kind, values in by_kind(snapshot.matrices, figure).items()
        for statistic in (min, median, max)
    }
    _write(curves, snapshot.iteration)


def _write(series: dict[str, float], iteration: int) -> None:
    """To TensorBoard and W&B through Megatron's writers, where the run has them."""
    if (tensorboard := get_tensorboard_writer()) is not None:
        for tag, value in series.items():
            tensorboard.add_scalar(tag, value, iteration)
    if (wandb := get_wandb_writer()) is not None and series:
        wandb.log(series, iteration)
