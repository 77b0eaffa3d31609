"""loss.png, drawn from metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from megatron_dion.megatron.run_directory import Record


def draw_loss(records: Sequence[Record], path: Path, unigram_entropy: float | None) -> None:
    """Draw training and validation loss against iterations.

    Args:
        records: Lines of metrics.jsonl.
        path: The picture to write.
        unigram_entropy: Of the corpus, in nats per token: the loss of a model that has learnt no
            more than how often each token occurs. Drawn as a line where it is known.
    """
    if not records:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, marker in (("train", ""), ("validation", "o")):
        curve = [(one["iteration"], one["lm_loss"]) for one in records if one["kind"] == kind]
        axes.plot(*zip(*curve, strict=True), label=kind, linewidth=1, marker=marker, markersize=3)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, label="unigram entropy", linestyle="--", color="grey")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    unfinished = path.with_name(path.name + ".tmp")
    figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(path)
