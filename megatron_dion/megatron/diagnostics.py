"""Measures the step of every N-th iteration and logs the figures where the run's curves are."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from megatron.training import get_args
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_dion.megatron import patches
from megatron_dion.optimizer.diagnostics import FIGURES, Snapshot, by_kind


def log_diagnostics(interval: int, record: Callable[[Snapshot], None]) -> None:
    """Make training measure its steps; every rank has to, since all of them take part.

    Args:
        interval: iterations from one measured step to the next.
        record: called on the last rank with each snapshot.
    """
    optimizers: list[Any] = []

    def measure(step: Callable[[], Any]) -> Any:
        iteration = get_args().curr_iteration + 1  # the iteration that this step completes
        if iteration % interval:
            return step()
        optimizers[-1].diagnose_next_step()
        result = step()
        if matrices := optimizers[-1].gather_diagnostics():
            snapshot = Snapshot(iteration, tuple(matrices))
            record(snapshot)
            _write_curves(snapshot)
        return result

    patches.when_optimizer_is_built(optimizers.append)
    patches.around_train_step(measure)


def _write_curves(snapshot: Snapshot) -> None:
    """To TensorBoard and W&B through Megatron's writers, where the run has them."""
    curves = dict(_curves(snapshot))
    if (tensorboard := get_tensorboard_writer()) is not None:
        for tag, value in curves.items():
            tensorboard.add_scalar(tag, value, snapshot.iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(curves, snapshot.iteration)


def _curves(snapshot: Snapshot) -> Iterator[tuple[str, float]]:
    """Tags and values; TensorBoard makes a section of what stands before a tag's first slash."""
    for figure in FIGURES:
        for kind, values in by_kind(snapshot.matrices, figure).items():
            for statistic in (min, median, max):
                yield f"dion-{figure}/{kind}/{statistic.__name__}", statistic(values)
