"""Pictures of predictions; needs matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dion_tools.plan.prediction import ACTIVATIONS, Prediction
from megatron_dion_tools.plan.tables import BINARY, DECIMAL, STEP, fitting_unit


def plot(predictions: Mapping[int, Sequence[Prediction]], path: Path, title: str) -> None:
    """Draws bars of one run's optimizers, or lines over several data-parallel sizes.

    Args:
        predictions: by data-parallel size those of the same optimizers.
        path: of the picture.
        title: above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
    figure.suptitle(title)
    if len(predictions) == 1:
        [found] = predictions.values()
        _bars(axes, found)
    else:
        _lines(axes, predictions)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, predictions: Sequence[Prediction]) -> None:
    labels = [found.run.optimizer.label for found in predictions]
    kinds = list(predictions[0].memory)
    kept, kept_size = fitting_unit(BINARY, (found.bytes_needed for found in predictions))
    _stack(axes[0], labels, kinds, lambda i, kind: predictions[i].memory[kind].busiest / kept_size)
    axes[0].set_title(f"memory of the rank with most, {kept}")
    when = [(w, n) for w in ("backward", "forward", "layer", "step") for n in (False, True)]
    names = [f"{w}, {'network' if n else 'NVLink'}" for w, n in when]
    sent, sent_size = fitting_unit(DECIMAL, (found.sent() for found in predictions))
    _stack(
        axes[1],
        labels,
        names,
        lambda i, name: predictions[i].sent(*when[names.index(name)]) / sent_size,
    )
    axes[1].set_title(f"sent in a step, {sent}")
    parts = ("products", "factorizations", "passes", "exchange")
    step, short = fitting_unit(STEP, (found.step.total for found in predictions))
    _stack(axes[2], labels, parts, lambda i, part: getattr(predictions[i].step, part) / short)
    axes[2].set_title(f"optimizer's step, {step} (a model)")


def _stack(
    axis: Any, labels: Sequence[str], kinds: Sequence[str], value: Callable[[int, str], float]
) -> None:
    left = [0.0] * len(labels)
    for kind in kinds:
        values = [value(i, kind) for i in range(len(labels))]
        axis.barh(labels, values, left=left, label=kind)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.legend(fontsize=7)


def _lines(axes: Any, predictions: Mapping[int, Sequence[Prediction]]) -> None:
    """Step time, bytes that the step sends, and memory without what all optimizers have alike."""
    quantities: tuple[tuple[str, Mapping[str, float], Callable[[Prediction], float]], ...] = (
        ("optimizer's step, {} (a model)", STEP, lambda p: p.step.total),
        ("sent by the step's own collectives, {}", DECIMAL, lambda p: p.sent("step")),
        (
            "weights, gradients and optimizer, {}",
            BINARY,
            lambda p: p.bytes_needed - p.memory[ACTIVATIONS].busiest,
        ),
    )
    sizes = sorted(predictions)
    for axis, (name, units, value) in zip(axes, quantities, strict=True):
        unit, divisor = fitting_unit(units, (value(p) for size in sizes for p in predictions[size]))
        for index, found in enumerate(predictions[sizes[0]]):
            line = "--" if found.run.optimizer.kind == "muon" else "-"
            color = "black" if found.run.optimizer.kind == "adamw" else None
            axis.plot(
                sizes,
                [value(predictions[size][index]) / divisor for size in sizes],
                line,
                marker="o",
                color=color,
                label=found.run.optimizer.label,
            )
        axis.set(title=name.format(unit), xlabel="data-parallel size", xscale="log", yscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
    axes[-1].legend(fontsize=8)
