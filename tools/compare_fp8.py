"""Compare training in FP8 with training in bf16, for Dion and AdamW, on the quick start's model.

Each run is one process that emulates FP8 on the CPU, with weights kept in FP8. Finished runs are
reused, so an interrupted comparison goes on where it stopped. Writes fp8.tsv and fp8.png.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _common import run_tool
from megatron_dion.training.run_directory import read_metrics
from quick_start import ROOT, Data, prepare
from sweep_learning_rates import SCALAR_LR, Candidate, measure, run_directory

# FP8 products need sizes that are multiples of 16, which the quick start's 344 is not.
SHARED = "--bf16 --ffn-hidden-size 384"
OPTIMIZERS = {
    "Dion": ("--optimizer dion", 0.004),
    "AdamW": (
        f"--optimizer adam --decoupled-lr {SCALAR_LR} --decoupled-min-lr {SCALAR_LR / 10}",
        0.001,
    ),
}
FP8 = "--fp8-emulation --fp8-param-gather"
PRECISIONS = {
    "bf16": "",
    "delayed": f"{FP8} --fp8-format hybrid --fp8-recipe delayed",
    "tensorwise": f"{FP8} --fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": f"{FP8} --fp8-format e4m3 --fp8-recipe blockwise",
}
SMOOTHED_OVER = 20


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        optimizer: its name.
        precision: `bf16` or the recipe.
        seed: of the run.
        validation_loss: after the last iteration, in nats per token.
        losses: of every training iteration.
    """

    optimizer: str
    precision: str
    seed: int
    validation_loss: float
    losses: tuple[float, ...]


def compare(folder: Path, iterations: int, seeds: int) -> list[Run]:
    """Train with every optimizer in every precision, or read what earlier calls measured."""
    data = Data(ROOT / "data")
    prepare(data)
    wanted = [
        (seed, optimizer, precision)
        for seed in range(1234, 1234 + seeds)
        for optimizer in OPTIMIZERS
        for precision in PRECISIONS
    ]
    runs = []
    for number, (seed, optimizer, precision) in enumerate(wanted, start=1):
        print(f"run {number}/{len(wanted)}: {optimizer}, {precision}, seed {seed}", file=sys.stderr)
        flags, rate = OPTIMIZERS[optimizer]
        candidate = Candidate(
            f"{optimizer} {precision} seed {seed}",
            f"{flags} {SHARED} {PRECISIONS[precision]} --seed {seed}",
            (rate,),
        )
        result = measure(candidate, rate, data, folder, iterations)
        records = read_metrics(run_directory(folder, candidate, rate) / "metrics.jsonl")
        losses = tuple(one["lm_loss"] for one in records if one["kind"] == "train")
        runs.append(Run(optimizer, precision, seed, result.validation_loss, losses))
    return runs


def table(runs: Sequence[Run]) -> str:
    """One line for each run: its validation loss, and how far it is from that of bf16."""
    in_bf16 = {(r.optimizer, r.seed): r.validation_loss for r in runs if r.precision == "bf16"}
    lines = ["optimizer\tprecision\tseed\tvalidation_loss\tgap_percent"]
    for run in runs:
        gap = 100 * (run.validation_loss / in_bf16[run.optimizer, run.seed] - 1)
        name = f"{run.optimizer}\t{run.precision}\t{run.seed}"
        lines.append(f"{name}\t{run.validation_loss:.4f}\t{gap:+.2f}")
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the training loss of all precisions, a panel for each optimizer, the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for optimizer, axes in zip(OPTIMIZERS, panels, strict=True):
        for run in runs:
            if run.optimizer == optimizer and run.seed == runs[0].seed:
                axes.plot(smoothed(run.losses), label=run.precision, linewidth=1)
        axes.set(title=optimizer, xlabel="iteration")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"training loss (nats per token, mean of {SMOOTHED_OVER})")
    panels[0].legend()
    figure.savefig(path, dpi=150)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over the last iterations."""
    ends = range(1, len(losses) + 1)
    windows = [losses[max(0, end - SMOOTHED_OVER) : end] for end in ends]
    return [sum(window) / len(window) for window in windows]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "fp8", metavar="DIR")
    parser.add_argument("--train-iters", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2, help="number of runs of each kind")
    arguments = parser.parse_args()
    runs = compare(arguments.output, arguments.train_iters, arguments.seeds)
    (arguments.output / "fp8.tsv").write_text(table(runs), encoding="utf-8")
    draw(runs, arguments.output / "fp8.png")
    print(table(runs))


if __name__ == "__main__":
    run_tool(main)
