"""What a lower loss costs: time of a step, measured, and bytes that it sends, planned."""

import contextlib
import io
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_dion_tools import cli

ROOT = Path(__file__).parent.parent.parent
MODEL = ("8B", "--tp", "2", "--dp", "8")
FRACTIONS = ("1/16", "1/8", "1/4", "1/2", "1")
STYLES = {
    "AdamW": {"color": "black", "marker": "s"},
    "Muon": {"color": "gray", "marker": "D"},
    "Dion": {"color": "#d95f02", "marker": "o"},
    "Dion with the residual": {"color": "#1b9e77", "marker": "^"},
}


def draw() -> Figure:
    """Losses of docs/results/residual.json against times of benchmarks/results/step.json."""
    cells = json.loads((ROOT / "docs" / "results" / "residual.json").read_text())["cells"]
    losses = {cell["method"]: cell["loss"] for cell in cells}
    table = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())["tables"]
    times = {row["optimizer"]: row["step_ms"] for row in table["weights"] if row["hidden"] == 1024}
    times["Muon"] = times["Muon, fp32 products"]
    sent = bytes_of("adamw", "muon-duplicated", *(f"dion:{fraction}" for fraction in FRACTIONS))
    figure = Figure(
        figsize=(6, 3.5), layout="constrained"
    )  # so narrow that a phone shows it legibly
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, costs in ((left, times), (right, sent)):
        for name, style in STYLES.items():
            points = [
                (costs[cost], losses[method], method.removeprefix("Dion ").removesuffix(" rows"))
                for method, cost in methods_of(name)
                if method in losses
            ]
            plot(axes, points, label=name, **style)
        axes.grid(alpha=0.3)
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.set(
        xlabel="ms a step, measured on a CPU\n(layer of 1024)", ylabel="validation loss (nats)"
    )
    right.set(xlabel="GB sent a step, planned\n(8B on TP2 x DP8, busiest rank)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def methods_of(name: str) -> list[tuple[str, str]]:
    """The study's methods of a line, and what their costs are called."""
    if not name.startswith("Dion"):
        return [(name, name)]
    study, benchmark = ("rows", ", residual") if "residual" in name else ("", "")
    return [(f"Dion {f} {study}".rstrip(), f"Dion {f}{benchmark}") for f in FRACTIONS]


def plot(axes: Axes, points: list[tuple[float, dict[str, float], str]], **style: str) -> None:
    """Means over seeds, with their standard deviations, and rank fractions beside them."""
    x = [cost for cost, _, _ in points]
    y = [loss["mean"] for _, loss, _ in points]
    axes.errorbar(x, y, yerr=[loss["sd"] for _, loss, _ in points], capsize=2, **style)
    for left, top, (*_, fraction) in zip(x, y, points, strict=True):
        if "/" in fraction:
            place = {"xytext": (6, 3), "textcoords": "offset points"}
            axes.annotate(fraction, (left, top), fontsize="small", **place)


def bytes_of(*optimizers: str) -> dict[str, float]:
    """What the rank that sends most sends for an optimizer in a step, GB, by our names."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.call(["plan", *MODEL, "--optimizer", *optimizers, "--json"])
    names = ["AdamW", "Muon", *(f"Dion {fraction}" for fraction in FRACTIONS)]
    plans = json.loads(output.getvalue())
    sent = {
        name: sum(each["bytes"] for each in plan["collectives"] if each["when"] != "layer") / 1e9
        for name, plan in zip(names, plans, strict=True)
    }
    return sent | {f"{name}, residual": gb for name, gb in sent.items()}
