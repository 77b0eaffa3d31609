"""Follows a run on the rank that knows the loss: metrics, picture and progress."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_dion.megatron import patches
from megatron_dion.megatron.progress import (
    describe_validation,
    human_count,
    human_duration,
    progress_line,
)
from megatron_dion.megatron.run_directory import MetricsFile, Record, read_metrics
from megatron_dion.optimizer.diagnostics import Snapshot, to_record
from megatron_dion.optimizer.stopwatch import Stopwatch

# Megatron's name for the loss of a language model.
LOSS_NAME = "lm loss"

_SECONDS_BETWEEN_PICTURES = 30.0

# The loss of one batch is noisy; a mean over a few says more about the end of a run.
_ITERATIONS_OF_FINAL_LOSS = 10


@dataclass(frozen=True)
class RunFacts:
    """What the recorder has to know about a run.

    Attributes:
        run_dir: Where its files go; None to write none.
        train_iters: Tells the iterations of the whole run; Megatron computes them from samples.
        log_interval: Iterations between progress lines.
        loss_name: Megatron's name for the loss.
        tokens_so_far: Tells the number of tokens trained on.
        unigram_entropy: Of the corpus, in nats per token, where it is known.
        sizes: Number of ranks, and how they are divided.
    """

    run_dir: Path | None
    train_iters: Callable[[], int]
    log_interval: int
    loss_name: str
    tokens_so_far: Callable[[], int]
    unigram_entropy: float | None
    sizes: Record


@dataclass
class _Progress:
    """Tokens and time spent on training steps, evaluations and checkpoints not counted."""

    iterations: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.iterations += 1
        self.tokens += tokens
        self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Recorder:
    """Listens to megatron's training loop through `patches`, and writes what it hears."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._optimizer: Any = None
        self._step_time = Stopwatch()
        self._optimizer_time = Stopwatch()
        self._start_time = time.monotonic()
        self._tokens_before_step = 0
        self._whole = _Progress()
        self._interval = _Progress()
        self._training: Record | None = None
        self._validation: Record | None = None
        self._last_losses: deque[float] = deque(maxlen=_ITERATIONS_OF_FINAL_LOSS)
        self._metrics: MetricsFile | None = None
        self._picture_time = time.monotonic()

    def listen(self) -> None:
        """Attach to megatron.training."""
        patches.when_optimizer_is_built(self._watch_optimizer)
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

    def _watch_optimizer(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        step = optimizer.step

        def timed_step(*args: Any, **options: Any) -> Any:
            with self._optimizer_time.running():
                return step(*args, **options)

        optimizer.step = timed_step

    def _time_step(self, step: Callable[[], Any]) -> Any:
        if self._whole.iterations == 0:
            self._start_time = time.monotonic()
        self._tokens_before_step = self._facts.tokens_so_far()
        with self._step_time.running():
            return step()

    def _on_iteration(self, logged: dict[str, Any]) -> None:
        record = self._training_record(logged)
        self._append(record, iterations_done=record["iteration"] - 1)
        self._training = record
        if record["lm_loss"] is not None:
            self._last_losses.append(record["lm_loss"])
        for progress in (self._whole, self._interval):
            progress.add(record["tokens"] - self._tokens_before_step, record["iteration_seconds"])
        if record["iteration"] % self._facts.log_interval == 0:
            say(self._progress_line(record))
            self._interval = _Progress()

    def _training_record(self, logged: dict[str, Any]) -> Record:
        return {
            "kind": "train",
            "iteration": logged["iteration"],
            "lm_loss": _number(logged["loss_dict"].get(self._facts.loss_name)),
            "grad_norm": _number(logged["grad_norm"]),
            "lr": logged["learning_rate"],
            "tokens": self._facts.tokens_so_far(),
            "iteration_seconds": self._step_time.read(),
            "optimizer_seconds": self._optimizer_time.read(),
            "optimizer_bytes": getattr(self._optimizer, "exchanged_bytes_per_step", 0),
            "householder_fallbacks": getattr(self._optimizer, "fallbacks", 0),
            "skipped": bool(logged["skipped_iter"]),
        }

    def _on_evaluation(self, prefix: str, iteration: int, losses: dict[str, Any]) -> None:
        if self._facts.loss_name not in losses:
            return  # another's script may call it something else
        loss = _number(losses[self._facts.loss_name])
        kind = "test" if "test set" in prefix else "validation"
        record = {"kind": kind, "iteration": iteration, "lm_loss": loss}
        if kind == "validation":
            # Megatron evaluates once more after training, on other samples: the first one counts.
            if self._validation is not None and self._validation["iteration"] == iteration:
                return
            self._validation = record
        self._append(record, iterations_done=iteration)
        if time.monotonic() - self._picture_time > _SECONDS_BETWEEN_PICTURES:
            self._draw()

    def _append(self, record: Record, iterations_done: int) -> None:
        if self._facts.run_dir is None:
            return
        if self._metrics is None:
            self._metrics = self._open_metrics(self._facts.run_dir, iterations_done)
        self._metrics.append(record)

    def _open_metrics(self, run_dir: Path, iterations_done: int) -> MetricsFile:
        metrics = MetricsFile(run_dir / "metrics.jsonl", iterations_done)
        if metrics.dropped:
            say(
                f"starting from iteration {iterations_done}: dropped the "
                f"{metrics.dropped} later lines of {metrics.path}"
            )
        # An earlier start from the same iteration has left nothing, so it is dropped as well.
        MetricsFile(run_dir / "starts.jsonl", iterations_done - 1).append(
            {
                "iteration": iterations_done,
                "tokens": self._tokens_before_step,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                **self._facts.sizes,
                "unigram_entropy": self._facts.unigram_entropy,
            }
        )
        return metrics

    def _draw(self) -> None:
        if self._metrics is None:
            return
        # matplotlib is needed with --run-dir only.
        from megatron_dion.megatron.plot import draw_loss

        path = self._metrics.path
        draw_loss(read_metrics(path), path.with_name("loss.png"), self._facts.unigram_entropy)
        self._picture_time = time.monotonic()

    def _progress_line(self, record: Record) -> str:
        seconds_per_iteration = (time.monotonic() - self._start_time) / self._whole.iterations
        return progress_line(
            record,
            train_iters=self._facts.train_iters(),
            validation=self._validation,
            tokens_per_second=self._interval.tokens_per_second,
            seconds_left=seconds_per_iteration * (self._facts.train_iters() - record["iteration"]),
        )

    def _summary(self, last: Record) -> str:
        finished = last["iteration"] >= self._facts.train_iters()
        parts = [
            f"iteration {last['iteration']}/{self._facts.train_iters()}",
            self._mean_loss(),
            describe_validation(self._validation),
            f"{human_count(last['tokens'])} tokens",
            f"{human_count(self._whole.tokens_per_second)} tokens/s",
            human_duration(time.monotonic() - self._start_time),
        ]
        if self._facts.unigram_entropy is not None:
            parts.append(f"unigram entropy of the corpus {self._facts.unigram_entropy:.4f}")
        if self._facts.run_dir is not None:
            parts.append(f"run directory {self._facts.run_dir}")
        return ("done: " if finished else "stopped: ") + " | ".join(filter(None, parts))

    def _mean_loss(self) -> str:
        if not self._last_losses:
            return "loss -"
        mean = sum(self._last_losses) / len(self._last_losses)
        return f"loss {mean:.4f} (mean of the last {len(self._last_losses)})"


def say(line: str) -> None:
    """Print one line of the project's own."""
    print(f"[dion] {line}", flush=True)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
