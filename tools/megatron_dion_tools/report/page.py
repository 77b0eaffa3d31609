"""Makes the page about runs: computes what `templates/report.html` shows."""

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from statistics import median
from typing import Any

import jinja2
from matplotlib.colors import to_hex

from megatron_dion.megatron.run_directory import Record
from megatron_dion.optimizer.diagnostics import FIGURES, Snapshot, by_kind
from megatron_dion.optimizer.rules import without_numbers
from megatron_dion_tools.convergence.curves import LOSS
from megatron_dion_tools.report import summary
from megatron_dion_tools.report.charts import Chart, Curve, draw, short
from megatron_dion_tools.report.folder import Route, RunFolder, mean

Row = Sequence[str | float | None]

_MARKERS = "osD^v<>"
_UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
_FEWEST_UNITS = 5
_TITLES = ("Captured share", "Norm of updates", "Norm of momenta")  # of the charts of FIGURES


class Report:
    """What is shown of runs; all but the first are compared with the first.

    Attributes:
        runs: The runs.
        names: Their names: those of the folders, or their paths where two folders have one name.
        title: What the report is about.
        answers: For each run, whether it converged, how fast, and compared with the first.
        charts: The curves of all runs.
    """

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        self.runs = runs
        names = [run.path.resolve().name for run in runs]
        self.names = names if len({*names}) == len(names) else [str(run.path) for run in runs]
        first, *others = self.names
        self.title = f"{len(runs)} runs, compared with {first}" if others else f"Run {first}"
        self.answers = [summary.verdict(run) for run in runs]
        for number, run in enumerate(runs[1:], start=1):
            self.answers[number] += summary.comparison(run, runs[0], first)
        self.charts = list(_charts(runs, self.names))

    def page(self) -> str:
        """Return HTML that needs no other file and no network."""
        templates = jinja2.Environment(
            loader=jinja2.PackageLoader("megatron_dion_tools.report"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        templates.filters["short"] = short
        facts = [dict(summary.facts(run)) for run in self.runs]
        return templates.get_template("report.html").render(
            report=self,
            colors=[to_hex(f"C{number}") for number, _ in enumerate(self.runs)],
            notes=[list(summary.notes(run)) for run in self.runs],
            facts=[
                (name, *(some.get(name, "–") for some in facts))
                for name in dict.fromkeys(name for some in facts for name in some)
            ],
            differing=list(_differing(self.runs)),
            details=[_details(run) for run in self.runs],
        )

    def png(self) -> bytes:
        """Return a picture of the losses, with the answers below it."""
        lines = [f"{name}: {answer}" for name, answer in zip(self.names, self.answers, strict=True)]
        options = {"format": "png", "bbox_inches": "tight", "dpi": 150}
        return draw(self.charts[:2], "\n".join(lines), **options)


def _charts(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterator[Chart]:
    """What the models learn, and how fast; the colour of a curve is the number of its run."""

    def overlay(value: Callable[[RunFolder], dict[int, float]]) -> Iterator[Curve]:
        for number, run in enumerate(runs):
            yield Curve("", value(run), number)
            yield Curve(names[number], mean(value(run)), number, marked=run.resumed_after)

    losses = [*overlay(lambda run: run.curve(LOSS))]
    for number, run in enumerate(runs):
        for (of_set, curve), marker in zip(run.validation.items(), cycle(_MARKERS), strict=False):
            name = "_" if number else f"validation{of_set}"  # once in the legend
            losses.append(Curve(name, curve, number, marker))
    longest = max((seconds for run in runs for seconds in run.elapsed.values()), default=0)
    unit = next((u for u, length in _UNITS.items() if longest >= _FEWEST_UNITS * length), "seconds")

    def by_time(curve: Curve) -> Curve:
        times = {i: s / _UNITS[unit] for i, s in runs[curve.color].elapsed.items()}
        points = {times[i]: y for i, y in curve.points.items() if i in times}
        return replace(curve, points=points, marked=[times[i] for i in curve.marked])

    chart = Chart("Loss", f"{LOSS}, nats per token", losses, top=_top(runs))
    yield chart
    timed = [by_time(curve) for curve in losses]
    yield replace(chart, title="Loss by time", curves=timed, x=f"{unit} of iterations")
    norms = [*overlay(lambda run: run.curve("grad_norm"))]
    yield Chart("Gradient norm", "grad_norm, before clipping", norms)
    rates = [Curve(names[number], run.curve("lr"), number) for number, run in enumerate(runs)]
    yield Chart("Learning rate", "lr", rates, from_zero=True)
    yield Chart("Speed", "tokens per second", [*overlay(lambda run: run.speeds)], from_zero=True)
    step = "optimizer_seconds"
    steps = [*overlay(lambda run: {r["iteration"]: r[step] for r, _ in run.settled})]
    yield Chart("Optimizer’s step", step, steps, from_zero=True)


def _top(runs: Sequence[RunFolder]) -> float | None:
    """A loss below which all that follows the first tenth of a run is, unless the run diverges.

    The first losses would hide how the last ones differ, and so would those of a run that diverges
    beside others.
    """
    late = [[*run.loss.values()][len(run.loss) // 10 :] for run in runs if run.loss]
    ends = [[*curve.values()][-1] for run in runs for curve in run.validation.values()]
    firsts = [losses[0] for losses in late] + [*filter(math.isfinite, ends)]
    return max(*firsts, min(map(max, late))) if late else None


def _differing(runs: Sequence[RunFolder]) -> Iterator[Row]:
    """The flags that are not the same in all runs; `--run-dir` only names the run."""
    arguments = [run.config["arguments"] for run in runs]
    flags = [run.config.get("defaults") or run.config["arguments"] for run in runs]
    for name in dict.fromkeys(name for some in flags for name in some if name != "run_dir"):
        values = [_text(some[name]) if name in some else "–" for some in arguments]
        if len({*values}) > 1:
            yield name, *values


def _details(run: RunFolder) -> dict[str, Any]:
    """What is said of a run alone."""
    last = run.diagnostics[-1] if run.diagnostics else Snapshot(0, ())
    arguments, defaults = run.config["arguments"], run.config.get("defaults", {})
    changed = {k: v for k, v in arguments.items() if k in defaults and v != defaults[k]}
    return {
        "kinds": _kinds(run.routes),
        "diagnostics": list(_diagnostics(run)),
        "last": last.iteration,
        "matrices": [
            (m.name, _size(m.rows, m.columns), m.rank, *(getattr(m, name) for name in FIGURES))
            for m in last.matrices
        ],
        "starts": [_start(start) for start in run.starts],
        "arguments": [(name, _text(v), _text(defaults[name])) for name, v in changed.items()],
        "command_line": shlex.join(run.config["command_line"]),
    }


def _kinds(routes: Sequence[Route]) -> list[Row]:
    """Matrices and parameters by kind: name, size, rank, optimizer, reason, number, elements."""
    groups: defaultdict[Row, list[int]] = defaultdict(list)
    for name, size, optimizer, reason, rank in routes:
        kind = (without_numbers(name), _size(*size), rank or None, optimizer, reason)
        groups[kind].append(math.prod(size))
    return [(*kind, len(numels), sum(numels)) for kind, numels in groups.items()]


def _size(*lengths: int) -> str:
    return " × ".join(map(str, lengths))


def _diagnostics(run: RunFolder) -> Iterator[Chart]:
    """Each figure over iterations: the median over all matrices of a kind."""
    for figure, title in zip(FIGURES, _TITLES, strict=True):
        medians: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for snapshot in run.diagnostics:
            for kind, values in by_kind(snapshot.matrices, figure).items():
                medians[_short_name(kind)][snapshot.iteration] = median(values)
        curves = [Curve(kind, medians[kind], number) for number, kind in enumerate(medians)]
        yield Chart(title, figure, curves)


def _short_name(kind: str) -> str:
    return kind.removeprefix("decoder.layers.*.").replace(".weight", "").replace("self_", "")


def _start(start: Record) -> Row:
    """Iteration, tokens, time, ranks."""
    time = start["time"].replace("T", " ").replace("+00:00", " UTC")
    return start["iteration"], short(start["tokens"]), time, summary.ranks(start)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
