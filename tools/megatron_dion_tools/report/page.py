"""Makes the page about a run: computes what `templates/report.html` shows."""

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import jinja2
import numpy as np

from megatron_dion.megatron.run_directory import Record
from megatron_dion.optimizer.diagnostics import Snapshot, by_kind
from megatron_dion.optimizer.rules import without_numbers
from megatron_dion_tools.report.charts import Chart, Curve, Point, short
from megatron_dion_tools.report.folder import Route, RunFolder

Row = Sequence[str | float | None]

_FINAL_ITERATIONS = 10
"""Iterations over which the training loss at the end is averaged."""
_LONGEST_MEAN = 50
_PARALLELISM = {
    "TP": "tensor_model",
    "PP": "pipeline_model",
    "CP": "context",
    "EP": "expert_model",
    "DP": "data",
}
_DIAGNOSTICS = {
    "captured": ("Captured share", "‖R‖ / ‖B‖"),
    "update_norm": ("Update", "Frobenius norm"),
    "momentum_norm": ("Momentum", "Frobenius norm"),
}


def render(run: RunFolder) -> str:
    """The page, which needs no other file and no network."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_dion_tools.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["short"] = short
    last = run.diagnostics[-1] if run.diagnostics else Snapshot(0, ())
    arguments, defaults = run.config["arguments"], run.config.get("defaults", {})
    changed = {k: v for k, v in arguments.items() if k in defaults and v != defaults[k]}
    others = {k: v for k, v in arguments.items() if k not in changed}
    return templates.get_template("report.html").render(
        run=run,
        name=run.path.resolve().name,
        verdict=_verdict(run),
        notes=list(_notes(run)),
        facts=dict(_facts(run)),
        curves=list(_curves(run)),
        optimizers=_optimizers(run.routes),
        kinds=_kinds(run.routes),
        routes=[_route(route) for route in run.routes],
        diagnostics=list(_diagnostics(run)),
        last=last,
        matrices=[
            (m.name, _size(m.rows, m.columns), m.rank, m.captured, m.update_norm, m.momentum_norm)
            for m in last.matrices
        ],
        starts=list(_starts(run)),
        changed_arguments=_arguments(changed, defaults),
        other_arguments=_arguments(others, defaults),
        command_line=shlex.join(run.config["command_line"]),
    )


def _verdict(run: RunFolder) -> str:
    planned = run.config["arguments"]["train_iters"]
    if not run.training:
        return "No iteration was recorded: the run has not begun, or it failed before. See its log."
    last = run.training[-1]["iteration"]
    if planned and last < planned:
        return f"Unfinished: iteration {last:,} of {planned:,}. It is running, or it was stopped."
    return f"Finished: iteration {last:,}" + (f" of {planned:,}." if planned else ".")


def _notes(run: RunFolder) -> Iterator[str]:
    """What the reader has to know before looking at curves."""
    if run.is_cut:
        yield "The last line of metrics.jsonl is cut off: the run was killed, or it is writing."
    losses = _points(run.training, "lm_loss")
    if broken := [int(iteration) for iteration, loss in losses if not math.isfinite(loss)]:
        yield f"The training loss is not finite in {_iterations(broken)}."
    if skipped := [record["iteration"] for record in run.training if record.get("skipped")]:
        yield f"The step was skipped in {_iterations(skipped)}: gradients were not finite."
    if run.training and (first := run.training[0]["iteration"]) > 1:
        yield f"Curves begin at iteration {first:,}: earlier ones are in another run directory."
    for iteration in run.resumed_after:
        yield f"The run was resumed after iteration {iteration:,}."


def _iterations(numbers: Sequence[int]) -> str:
    more = len(numbers) - 1
    return f"iteration {numbers[0]:,}" + (f" and {more:,} more" if more else "")


def _facts(run: RunFolder) -> Iterator[tuple[str, str]]:
    """The numbers that readers ask for first."""
    args = run.config["arguments"]
    is_dion = args["optimizer"] == "dion"
    rank = f", rank fraction {args['dion_rank_fraction']:g}" if is_dion else ""
    yield "optimizer", f"{args['optimizer']}{rank}"
    if losses := [loss for _, loss in _points(run.training, "lm_loss")][-_FINAL_ITERATIONS:]:
        yield f"training loss, mean of {len(losses)}", short(fmean(losses))
    if validation := _points(run.records, "lm_loss", kind="validation"):
        yield "validation loss", short(validation[-1][1])
    if run.training:
        seconds = sum(record["iteration_seconds"] for record in run.training)
        step = sum(record["optimizer_seconds"] for record in run.training)
        yield "tokens", short(run.training[-1]["tokens"])
        if speeds := _speeds(run):
            yield "tokens/s, median", short(median(speed for _, speed in speeds))
        time = timedelta(seconds=round(seconds))
        yield "time, in optimizer", f"{time}, {step / seconds:.1%}"
        yield "sent per step", f"{short(run.training[-1]['optimizer_bytes'] / 1e6)} MB"


def _points(records: Iterable[Record], name: str, kind: str = "train") -> list[Point]:
    """A quantity over iterations, in records of one kind that have it."""
    values = ((r["iteration"], r.get(name)) for r in records if r["kind"] == kind)
    return [(iteration, value) for iteration, value in values if value is not None]


def _with_mean(name: str, points: Sequence[Point]) -> list[Curve]:
    """A curve, and in front of it, if it is long, its moving mean."""
    window = min(len(points) // 20, _LONGEST_MEAN)
    if window < 2:
        return [Curve(name, points)]
    iterations, values = np.array(points).T
    means = np.convolve(values, np.full(window, 1 / window), "valid")
    centres = iterations[window - 1 :] - (window - 1) / 2
    mean = list(zip(centres.tolist(), means.tolist(), strict=True))
    return [Curve(name, points, is_faint=True), Curve(f"mean of {window}", mean)]


def _curves(run: RunFolder) -> Iterator[Chart]:
    """What the model learns, and how fast."""
    losses = _with_mean("training", _points(run.training, "lm_loss"))
    validation = _points(run.records, "lm_loss", kind="validation")
    losses.append(Curve("validation", validation, has_dots=True))
    yield Chart("Loss", "nats per token", losses)
    norms = _with_mean("norm", _points(run.training, "grad_norm"))
    yield Chart("Gradient norm", "before clipping", norms)
    rates = [Curve("rate", _points(run.training, "lr"))]
    yield Chart("Learning rate", "", rates, from_zero=True)
    speeds = _with_mean("rate", _speeds(run))
    yield Chart("Tokens per second", "all ranks", speeds, from_zero=True)
    records = [record for record, _ in _settled(run)]
    iteration = Curve("iteration", _points(records, "iteration_seconds"))
    step = Curve("optimizer’s step", _points(records, "optimizer_seconds"))
    yield Chart("Time", "seconds", [iteration, step])


def _settled(run: RunFolder) -> list[tuple[Record, int]]:
    """Iterations with their tokens, but for the first of each start, which sets things up."""
    starts = {start["iteration"] for start in run.starts}
    return [
        (record, record["tokens"] - before["tokens"])
        for before, record in pairwise(run.training)
        if before["iteration"] not in starts
    ]


def _speeds(run: RunFolder) -> list[Point]:
    """Tokens per second over iterations."""
    return [(r["iteration"], tokens / r["iteration_seconds"]) for r, tokens in _settled(run)]


def _optimizers(routes: Sequence[Route]) -> list[Row]:
    """For each optimizer: parameters, logical matrices, elements and their share."""
    rows: list[Row] = []
    for optimizer in dict.fromkeys(route.optimizer for route in routes):
        some = [route for route in routes if route.optimizer == optimizer]
        parameters = len({route.parameter for route in some})
        matrices = sum(route.rank > 0 for route in some)
        numel = sum(route.numel for route in some)
        share = numel / sum(route.numel for route in routes)
        rows.append((optimizer, parameters, matrices or None, numel, f"{share:.1%}"))
    return rows


def _route(route: Route) -> Row:
    """Name, size, rank, optimizer, reason."""
    return route.name, _size(*route.size), route.rank or None, route.optimizer, route.reason


def _kinds(routes: Sequence[Route]) -> list[Row]:
    """The same for each kind of matrix or parameter, and how many there are, and their elements."""
    groups: defaultdict[Row, list[int]] = defaultdict(list)
    for route in routes:
        kind = route._replace(name=without_numbers(route.name))
        groups[_route(kind)].append(route.numel)
    return [(*kind, len(numels), sum(numels)) for kind, numels in groups.items()]


def _size(*lengths: int) -> str:
    return " × ".join(map(str, lengths))


def _diagnostics(run: RunFolder) -> Iterator[Chart]:
    """Each figure over iterations: the median over all matrices of a kind."""
    for figure, (title, unit) in _DIAGNOSTICS.items():
        medians: defaultdict[str, list[Point]] = defaultdict(list)
        for snapshot in run.diagnostics:
            for kind, values in by_kind(snapshot.matrices, figure).items():
                medians[_short_name(kind)].append((snapshot.iteration, median(values)))
        yield Chart(title, unit, [Curve(kind, points) for kind, points in medians.items()])


def _short_name(kind: str) -> str:
    return kind.removeprefix("decoder.layers.*.").replace(".weight", "").replace("self_", "")


def _starts(run: RunFolder) -> Iterator[Row]:
    """For each start: iteration, tokens, time, ranks."""
    for start in run.starts:
        time = start["time"].replace("T", " ").replace("+00:00", " UTC")
        sizes = {name: start[f"{long}_parallel_size"] for name, long in _PARALLELISM.items()}
        divided = " × ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
        ranks = ": ".join(filter(None, [str(start["world_size"]), divided]))
        yield start["iteration"], short(start["tokens"]), time, ranks


def _arguments(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Row]:
    """Name, value and default."""
    return [
        (n, _text(v), _text(defaults[n]) if n in defaults else "–") for n, v in arguments.items()
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
