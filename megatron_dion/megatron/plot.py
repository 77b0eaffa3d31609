"""loss.png, drawn from metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from megatron_dion.megatron.run_directory import Record


def draw_loss(records: Sequence[Record], path: Path, unigram_entropy: float | None) -> None:
    """Draw training and validation loss against iterations and tokens.

    Args:
        records: Lines of metrics.jsonl.
        path: The picture to write.
        unigram_entropy: Of the corpus, in nats per token: the loss of a model that has learnt no
            more than how often each token occurs. Drawn as a line where it is known.
    """
    training = [record for record in records if record["kind"] == "train"]
    if not training:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_curve(training), label="training", linewidth=1)
    validation = [record for record in records if record["kind"] == "validation"]
    if validation:
        axes.plot(*_curve(validation), label="validation", marker="o", markersize=3)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, label="unigram entropy", linestyle="--", color="grey")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    tokens_per_iteration = training[-1]["tokens"] / training[-1]["iteration"] / 1e6
    tokens_axis = axes.secondary_xaxis(
        "top", functions=(lambda x: x * tokens_per_iteration, lambda x: x / tokens_per_iteration)
    )
    tokens_axis.set_xlabel("million tokens")
    unfinished = path.with_name(path.name + ".tmp")
    figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(path)


def _curve(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    return [record["iteration"] for record in records], [record["lm_loss"] for record in records]
