"""Follows a run on the rank that knows the loss: metrics, picture and progress."""

import argparse
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron.training import get_args

from megatron_dion.megatron import patches
from megatron_dion.megatron.data_checks import unigram_entropy
from megatron_dion.megatron.progress import (
    describe_validation,
    human_count,
    human_duration,
    progress_line,
    say,
)
from megatron_dion.megatron.run_directory import MetricsFile, Record, read_metrics
from megatron_dion.optimizer.diagnostics import Snapshot, to_record
from megatron_dion.optimizer.stopwatch import Stopwatch

# Megatron's name for the loss of a language model.
LOSS_NAME = "lm loss"

_SECONDS_BETWEEN_PICTURES = 30.0

# The loss of one batch is noisy; a mean over a few says more about the end of a run.
_ITERATIONS_OF_FINAL_LOSS = 10

_SIZES = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
)


class Recorder:
    """Listens to megatron's training loop through `patches`, and writes what it hears."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._run_dir = None if args.run_dir is None else Path(args.run_dir)
        self._log_interval = args.log_interval
        self._unigram_entropy = unigram_entropy(args)
        self._optimizer: Any = None
        self._step_time = Stopwatch()
        self._optimizer_time = Stopwatch()
        self._start_time = self._picture_time = time.monotonic()
        self._tokens_before_step = 0
        # Tokens, and seconds of training steps alone, without evaluations and checkpoints.
        self._recent: deque[tuple[int, float]] = deque(maxlen=args.log_interval)
        self._iterations = 0  # of this start of the run
        self._training: Record | None = None
        self._validation: Record | None = None
        self._last_losses: deque[float] = deque(maxlen=_ITERATIONS_OF_FINAL_LOSS)
        self._metrics: MetricsFile | None = None

    def listen(self) -> None:
        """Attach to megatron.training."""
        patches.when_optimizer_is_built(self._time_optimizer)
        patches.around_train_step(self._time_step)
        patches.after_each_iteration(self._on_iteration)
        patches.after_each_evaluation(self._on_evaluation)

    def close(self) -> None:
        """Draw the final picture and print the summary."""
        self._draw()
        if self._training is not None:
            say(self._summary(self._training))

    def write_diagnostics(self, snapshot: Snapshot) -> None:
        """Add what was measured in an iteration to metrics.jsonl, before the iteration's line."""
        self._append(to_record(snapshot), iterations_done=snapshot.iteration - 1)

    def _time_optimizer(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        step = optimizer.step

        def timed_step(*args: Any, **options: Any) -> Any:
            with self._optimizer_time.running():
                return step(*args, **options)

        optimizer.step = timed_step

    def _time_step(self, step: Callable[[], Any]) -> Any:
        if self._iterations == 0:
            self._start_time = time.monotonic()
        self._tokens_before_step = _tokens_so_far()
        with self._step_time.running():
            return step()

    def _on_iteration(self, logged: dict[str, Any]) -> None:
        iteration = logged["iteration"]
        self._training = record = {
            "kind": "train",
            "iteration": iteration,
            "lm_loss": _number(logged["loss_dict"].get(LOSS_NAME)),
            "grad_norm": _number(logged["grad_norm"]),
            "lr": logged["learning_rate"],
            "tokens": _tokens_so_far(),
            "iteration_seconds": self._step_time.read(),
            "optimizer_seconds": self._optimizer_time.read(),
            "optimizer_bytes": getattr(self._optimizer, "exchanged_bytes_per_step", 0),
            "skipped": bool(logged["skipped_iter"]),
        }
        self._append(record, iterations_done=iteration - 1)
        if record["lm_loss"] is not None:
            self._last_losses.append(record["lm_loss"])
        tokens = record["tokens"] - self._tokens_before_step
        self._recent.append((tokens, record["iteration_seconds"]))
        self._iterations += 1
        if iteration % self._log_interval == 0:
            # A run whose length is given in samples learns its iterations after its start.
            train_iters = get_args().train_iters
            seconds = (time.monotonic() - self._start_time) / self._iterations
            left, speed = seconds * (train_iters - iteration), self._tokens_per_second()
            say(progress_line(record, train_iters, self._validation, speed, left))

    def _tokens_per_second(self) -> float:
        tokens, seconds = (sum(values) for values in zip(*self._recent, strict=True))
        return tokens / seconds if seconds else 0.0

    def _on_evaluation(self, prefix: str, iteration: int, losses: dict[str, Any]) -> None:
        if LOSS_NAME not in losses:
            return  # another's script may call it something else
        kind = "test" if "test set" in prefix else "validation"
        record = {"kind": kind, "iteration": iteration, "lm_loss": _number(losses[LOSS_NAME])}
        if kind == "validation":
            # Megatron evaluates once more after training, on other samples: the first one counts.
            if self._validation is not None and self._validation["iteration"] == iteration:
                return
            self._validation = record
        self._append(record, iterations_done=iteration)
        if time.monotonic() - self._picture_time > _SECONDS_BETWEEN_PICTURES:
            self._draw()

    def _append(self, record: Record, iterations_done: int) -> None:
        if self._run_dir is None:
            return
        if self._metrics is None:
            self._metrics = self._open_metrics(self._run_dir, iterations_done)
        self._metrics.append(record)

    def _open_metrics(self, run_dir: Path, iterations_done: int) -> MetricsFile:
        metrics = MetricsFile(run_dir / "metrics.jsonl", iterations_done)
        if metrics.dropped:
            say(
                f"starting from iteration {iterations_done}: dropped the "
                f"{metrics.dropped} later lines of {metrics.path}"
            )
        start = {
            "iteration": iterations_done,
            "tokens": self._tokens_before_step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **{name: getattr(get_args(), name) for name in _SIZES},
            "unigram_entropy": self._unigram_entropy,
        }
        # An earlier start from the same iteration has left nothing, so it is dropped as well.
        MetricsFile(run_dir / "starts.jsonl", iterations_done - 1).append(start)
        return metrics

    def _draw(self) -> None:
        if self._metrics is None:
            return
        # matplotlib is needed with --run-dir only.
        from megatron_dion.megatron.plot import draw_loss

        path = self._metrics.path
        draw_loss(read_metrics(path), path.with_name("loss.png"), self._unigram_entropy)
        self._picture_time = time.monotonic()

    def _summary(self, last: Record) -> str:
        train_iters, losses = get_args().train_iters, self._last_losses
        mean = (
            f"{sum(losses) / len(losses):.4f} (mean of the last {len(losses)})" if losses else "-"
        )
        entropy = self._unigram_entropy
        parts = [
            f"iteration {last['iteration']}/{train_iters}",
            f"loss {mean}",
            describe_validation(self._validation),
            f"{human_count(last['tokens'])} tokens",
            f"{human_count(self._tokens_per_second())} tokens/s",
            human_duration(time.monotonic() - self._start_time),
            "" if entropy is None else f"unigram entropy of the corpus {entropy:.4f}",
            "" if self._run_dir is None else f"run directory {self._run_dir}",
        ]
        state = "done" if last["iteration"] >= train_iters else "stopped"
        return f"{state}: " + " | ".join(filter(None, parts))


def _tokens_so_far() -> int:
    # A checkpoint replaces the counter, so it has to be read where Megatron keeps it.
    args = get_args()
    return int(args.consumed_train_samples * args.seq_length)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
