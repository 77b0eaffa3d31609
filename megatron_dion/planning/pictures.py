"""Pictures of predictions; needs matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dion.planning.prediction import Prediction

_GIB, _GB = 2.0**30, 1e9


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
    step = ("products", "factorizations", "passes", "exchange")
    _stack(axes[0], labels, kinds, lambda i, kind: predictions[i].memory[kind].busiest / _GIB)
    axes[0].set_title("memory of the rank with most, GiB")
    when = [(w, n) for w in ("backward", "forward", "layer", "step") for n in (False, True)]
    names = [f"{w}, {'network' if n else 'NVLink'}" for w, n in when]
    _stack(
        axes[1],
        labels,
        names,
        lambda i, name: predictions[i].sent(*when[names.index(name)]) / _GB,
    )
    axes[1].set_title("sent in a step, GB")
    _stack(axes[2], labels, step, lambda i, part: 1e3 * getattr(predictions[i].step, part))
    axes[2].set_title("optimizer's step, ms (a model)")


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
    quantities: tuple[tuple[str, Callable[[Prediction], float]], ...] = (
        ("optimizer's step, ms (a model)", lambda p: 1e3 * p.step.total),
        ("sent by the step's own collectives, GB", lambda p: p.sent("step") / _GB),
        (
            "weights, gradients and optimizer, GiB",
            lambda p: (p.bytes_needed - p.memory["activations"].busiest) / _GIB,
        ),
    )
    sizes = sorted(predictions)
    for axis, (name, value) in zip(axes, quantities, strict=True):
        for index, found in enumerate(predictions[sizes[0]]):
            line = "--" if found.run.optimizer.kind == "muon" else "-"
            color = "black" if found.run.optimizer.kind == "adamw" else None
            axis.plot(
                sizes,
                [value(predictions[size][index]) for size in sizes],
                line,
                marker="o",
                color=color,
                label=found.run.optimizer.label,
            )
        axis.set(title=name, xlabel="data-parallel size", xscale="log", yscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
    axes[-1].legend(fontsize=8)
