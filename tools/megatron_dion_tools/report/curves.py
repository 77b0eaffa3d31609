"""Of the report: loss, gradient norm, learning rate, and what an iteration takes."""

from collections.abc import Sequence

from megatron_dion.megatron.run_directory import Record
from megatron_dion_tools.convergence.noise import smoothed
from megatron_dion_tools.report.charts import Chart, Point, Series, draw
from megatron_dion_tools.report.folder import RunFolder
from megatron_dion_tools.report.pages import Html, element

_FEWEST_TO_AVERAGE = 100
_LONGEST_MEAN = 50

_NONE = "No iteration was recorded."


def curves(run: RunFolder) -> list[Html]:
    """The charts of what is learnt."""
    if not run.training:
        return [element("p", _NONE, class_="none")]
    entropies = [start.get("unigram_entropy") for start in run.starts]
    level = ("unigram entropy", entropies[-1]) if entropies and entropies[-1] else None
    loss = Chart(
        "Loss",
        "nats per token",
        [
            *_with_mean("training", points_of(run.training, "lm_loss")),
            Series("validation", points_of(run.of_kind("validation"), "lm_loss"), 2, "dots"),
        ],
        marks=run.resumed_after,
        level=level,
    )
    norm = points_of(run.training, "grad_norm")
    rate = points_of(run.training, "lr")
    marks = run.resumed_after
    return [
        element("div", draw(loss), class_="wide"),
        draw(Chart("Gradient norm", "before clipping", _with_mean("norm", norm), marks)),
        draw(Chart("Learning rate", "", [Series("rate", rate)], marks, from_zero=True)),
    ]


def throughput(run: RunFolder) -> list[Html]:
    """The charts of what it takes; without the iterations that set all things up."""
    found = [iteration for session in run.sessions for iteration in session.settled]
    if not found:
        return [element("p", "Too few iterations were recorded.", class_="none")]
    records = [record for record, _ in found]
    rates = [(r["iteration"], tokens / r["iteration_seconds"]) for r, tokens in found]
    seconds = [
        Series("iteration", points_of(records, "iteration_seconds")),
        Series("of it the optimizer's step", points_of(records, "optimizer_seconds"), 2),
    ]
    marks = run.resumed_after
    return [
        draw(
            Chart(
                "Tokens per second",
                "all ranks",
                _with_mean("tokens/s", rates),
                marks,
                from_zero=True,
            )
        ),
        draw(Chart("Time", "seconds", seconds, marks)),
    ]


def points_of(records: Sequence[Record], name: str) -> list[Point]:
    """A quantity over iterations, where it was recorded."""
    found = ((record["iteration"], record.get(name)) for record in records)
    return [(iteration, value) for iteration, value in found if value is not None]


def _with_mean(name: str, points: Sequence[Point]) -> list[Series]:
    """Of many points a mean as well, behind which they are pale."""
    if len(points) < _FEWEST_TO_AVERAGE:
        return [Series(name, points)]
    window = min(len(points) // 20, _LONGEST_MEAN)
    mean = smoothed({int(iteration): value for iteration, value in points}, window)
    late = (window - 1) / 2  # a mean is of its middle
    full = [(iteration - late, value) for iteration, value in list(mean.items())[window - 1 :]]
    return [Series(name, points, look="faint"), Series(f"mean of {window}", full)]
