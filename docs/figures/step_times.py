"""What a step takes: against its floor, and beside the steps of AdamW and of Muon."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FRACTIONS = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0}
MATRICES = {"64 x 256": ("#d95f02", 1.5), "4 x 1024": ("#1f78b4", 1.15)}  # their goals
OTHERS = {
    "Muon, Newton-Schulz in fp32": "Muon, products in fp32",
    "Muon, Megatron": "Muon, products in bf16",
    "AdamW, Megatron on CPU": "AdamW",
}
HIDDEN = 512


def draw() -> Figure:
    """The table `floor` of two processors, the table `weights` of one."""
    figure, (floor, times) = plt.subplots(1, 2, figsize=(9.5, 4.0))
    _draw_floor(floor)
    _draw_times(times, _result("step"))
    for axes in (floor, times):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(FRACTIONS.values()), list(FRACTIONS))
        axes.set_xlabel("rank fraction")
    figure.tight_layout()
    return figure


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _draw_floor(axes: Axes) -> None:
    for name, style in (("step_avx2", "o-"), ("step", "o:")):
        result = _result(name)
        for matrices, (color, _) in MATRICES.items():
            rows = [row for row in result["tables"]["floor"] if row["matrices"] == matrices]
            axes.plot(
                [float(Fraction(row["fraction"])) for row in rows],
                [row["step_to_floor"] for row in rows],
                style,
                color=color,
                label=f"{matrices}, {result['machine']['instructions']}",
            )
    for color, goal in MATRICES.values():
        axes.axhline(goal, color=color, linestyle="--", linewidth=0.8)
        axes.annotate(f"goal: {goal}", (1.0, goal + 0.01), ha="right", color=color, fontsize=8)
    axes.set(ylabel="step / floor", ylim=(0.7, 1.6), title="Dion on equal square matrices")
    axes.legend(loc="lower left", fontsize=8)


def _draw_times(axes: Axes, result: Any) -> None:
    """Dion's steps by rank fraction; the others have none."""
    rows = result["tables"]["weights"]
    times = {
        row["optimizer"]: row["step_ms"]
        for row in rows
        if (row["hidden"], row["weights"]) == (HIDDEN, "fp32")
    }
    for suffix, label, color in (
        ("", "Dion, products in fp32", "#1b9e77"),
        (", products in bf16", "Dion, products in bf16", "#7570b3"),
    ):
        found = [times[f"Dion {fraction}{suffix}"] for fraction in FRACTIONS]
        axes.plot(list(FRACTIONS.values()), found, "o-", color=color, label=label)
    for name, label in OTHERS.items():
        axes.axhline(times[name], color="#444444", linestyle="--", linewidth=0.8)
        axes.annotate(label, (1 / 16, 1.06 * times[name]), color="#444444", fontsize=8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    title = f"one layer, hidden {HIDDEN}, {result['machine']['instructions']}"
    axes.set(ylabel="step, ms of processor time", ylim=(1, 700), title=title)
    axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.3), fontsize=8)
