"""Sweep the learning rate of AdamW and of Dion on the quick start's model and text.

Each run is one process with the flags of examples/quick_start.args. Finished runs are reused, so an
interrupted sweep goes on where it stopped. Writes sweep.tsv and sweep.png.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _common import run_tool
from megatron_dion.training.run_directory import read_metrics
from quick_start import ROOT, Data, Layout, prepare, train, training_command

SCALAR_LR = 0.003
"""AdamW's learning rate for embeddings and output where the matrices have one of their own."""


@dataclass(frozen=True)
class Candidate:
    """An optimizer, and the learning rates to try."""

    name: str
    flags: str
    rates: tuple[float, ...]
    separate_scalar_lr: bool = False

    def arguments(self, rate: float) -> list[str]:
        """The flags of one run; the rate decays to a tenth."""
        flags = [*self.flags.split(), "--lr", str(rate), "--min-lr", str(rate / 10)]
        if self.separate_scalar_lr:
            flags += ["--dion-scalar-lr-mult", str(SCALAR_LR / rate)]
        return flags


ONE_RATE = (0.001, 0.002, 0.004, 0.008)
CANDIDATES = (
    Candidate("AdamW", "--optimizer adam", ONE_RATE),
    Candidate(
        "AdamW, embeddings apart",
        f"--optimizer adam --decoupled-lr {SCALAR_LR} --decoupled-min-lr {SCALAR_LR / 10}",
        (0.0005, 0.001, 0.002),
    ),
    Candidate("Dion 1/4 spectral", "--dion-scale-mode spectral", ONE_RATE),
    Candidate(
        "Dion 1/4 dion",
        "--dion-scale-mode dion",
        (0.005, 0.01, 0.02, 0.04),
        separate_scalar_lr=True,
    ),
    Candidate("Dion 1 spectral", "--dion-scale-mode spectral --dion-rank-fraction 1", ONE_RATE),
)


@dataclass(frozen=True)
class Result:
    """The end of one run."""

    candidate: str
    rate: float
    train_loss: float
    validation_loss: float


def measure(candidate: Candidate, rate: float, data: Data, folder: Path, iterations: int) -> Result:
    """Train once, or read what an earlier call measured."""
    run_dir = run_directory(folder, candidate, rate)
    metrics = run_dir / "metrics.jsonl"
    if not is_finished(metrics, iterations):
        run_dir.mkdir(parents=True, exist_ok=True)
        flags = [*candidate.arguments(rate), "--train-iters", str(iterations)]
        flags += ["--eval-interval", str(iterations), "--eval-iters", "20"]
        command = training_command(data, run_dir, Layout(1, 1), flags)
        train(command, run_dir / "train.log")
    records = read_metrics(metrics)
    losses = [record["lm_loss"] for record in records if record["kind"] == "train"]
    validation = [record["lm_loss"] for record in records if record["kind"] == "validation"]
    last = losses[-10:]
    return Result(candidate.name, rate, sum(last) / len(last), validation[-1])


def run_directory(folder: Path, candidate: Candidate, rate: float) -> Path:
    """Where a run writes."""
    slug = re.sub(r"[^a-z0-9]+", "-", candidate.name.lower())
    return folder / f"{slug}-{rate:g}"


def is_finished(metrics: Path, iterations: int) -> bool:
    """Whether a run has reached its last iteration and its validation."""
    records = read_metrics(metrics)
    kinds = {record["kind"] for record in records if record["iteration"] == iterations}
    return kinds == {"train", "validation"}


def write_table(results: Sequence[Result], path: Path) -> None:
    """Write one line for each run."""
    lines = ["optimizer\tlr\ttrain_loss\tvalidation_loss"]
    lines += [f"{r.candidate}\t{r.rate:g}\t{r.train_loss}\t{r.validation_loss}" for r in results]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw validation loss against learning rate, a curve for each optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for name in dict.fromkeys(result.candidate for result in results):
        points = [(r.rate, r.validation_loss) for r in results if r.candidate == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", xlabel="learning rate (--lr)", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "sweep", metavar="DIR")
    parser.add_argument("--train-iters", type=int, default=300)
    arguments = parser.parse_args()
    data = Data(ROOT / "data")
    prepare(data)
    runs = [(candidate, rate) for candidate in CANDIDATES for rate in candidate.rates]
    results = []
    for number, (candidate, rate) in enumerate(runs, start=1):
        print(f"run {number}/{len(runs)}: {candidate.name}, lr {rate:g}", file=sys.stderr)
        results.append(measure(candidate, rate, data, arguments.output, arguments.train_iters))
        write_table(results, arguments.output / "sweep.tsv")
        draw(results, arguments.output / "sweep.png")
    print((arguments.output / "sweep.tsv").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_tool(main)
