"""Measures the step of every N-th iteration, and writes it where the run's curves are."""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.training import get_args
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_dion.megatron import patches
from megatron_dion.optimizer.diagnostics import Snapshot, by_kind


class Diagnostics:
    """Listens on every rank, since all of them measure.

    Args:
        interval: iterations from one measured step to the next.
        record: is given each snapshot, on the last rank.
    """

    def __init__(self, interval: int, record: Callable[[Snapshot], None]) -> None:
        self._interval = interval
        self._record = record
        self._optimizer: Any = None

    def listen(self) -> None:
        """Attach to megatron.training."""
        patches.when_optimizer_is_built(self._remember)
        patches.around_train_step(self._step)

    def _remember(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def _step(self, step: Callable[[], Any]) -> Any:
        iteration = get_args().curr_iteration + 1  # the one that this step completes
        if iteration % self._interval:
            return step()
        self._optimizer.diagnose_next_step()
        result = step()
        matrices = self._optimizer.gather_diagnostics()
        if matrices:
            snapshot = Snapshot(iteration, tuple(matrices))
            self._record(snapshot)
            _write_curves(snapshot)
        return result


def _write_curves(snapshot: Snapshot) -> None:
    """To TensorBoard and W&B, through Megatron's writers, where the run has them."""
    curves = dict(_curves(snapshot))
    if (tensorboard := get_tensorboard_writer()) is not None:
        for tag, value in curves.items():
            tensorboard.add_scalar(tag, value, snapshot.iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(curves, snapshot.iteration)


def _curves(snapshot: Snapshot) -> Iterator[tuple[str, float]]:
    """Least, median and largest of each kind of matrix; tags up to the slash make a section."""
    for kind, figures in by_kind(snapshot.matrices).items():
        for figure, spread in figures.items():
            for statistic, value in vars(spread).items():
                yield f"dion-{figure}/{kind}/{statistic}", value
