"""Of the report: what `--dion-log-interval` has recorded of the matrices."""

import html
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from statistics import median

from megatron_dion.optimizer.diagnostics import (
    MatrixDiagnostics,
    Snapshot,
    by_kind,
    read_diagnostics,
)
from megatron_dion_tools.report.advisor import advise, describe
from megatron_dion_tools.report.charts import COLOURS, Chart, Series, draw, number
from megatron_dion_tools.report.folder import RunFolder
from megatron_dion_tools.report.pages import Html, element, row, table

_FIGURES = {
    "captured": ("Captured", "‖PRᵀ‖ / ‖B‖; its square is the share of the energy"),
    "stable_rank": ("Stable rank of B", "at least"),
    "orthonormality_error": ("Orthonormality error", "‖PᵀP − I‖"),
    "update_rms": ("Update, RMS", "of the elements"),
    "update_norm": ("Update, spectral norm", ""),
    "momentum_norm": ("Momentum, norm", "Frobenius"),
}
_ENERGY = 0.9
_NO_LAYER = "–"


def diagnostics(run: RunFolder) -> list[Html]:
    """Figures by kind over iterations, and of the last ones a map over layers and kinds."""
    try:
        snapshots = read_diagnostics(run.records)
    except ValueError as error:
        return [element("p", f"{error}.", class_="none")]
    if not snapshots:
        return [element("p", _why_none(run), class_="none")]
    last = snapshots[-1]
    every = f"All {len(last.matrices):,} matrices in iteration {last.iteration:,}"
    return [
        element("p", "Curves are medians over layers and experts."),
        element("div", *(_over_time(run, snapshots, name) for name in _FIGURES), class_="charts"),
        element("h3", f"Iteration {last.iteration}, by layer"),
        *_maps(last.matrices),
        *_advice(snapshots),
        element(
            "details",
            element("summary", every),
            _matrices(last.matrices),
            class_="searched",
        ),
    ]


def _why_none(run: RunFolder) -> str:
    if run.arguments.optimizer != "dion":
        return "Only Dion has diagnostics."
    return (
        "This run has recorded none. With --dion-log-interval N, every N iterations the metrics"
        " tell of each matrix how much of its momentum the update captures, its stable rank, and"
        " the sizes of updates."
    )


def _over_time(run: RunFolder, snapshots: Sequence[Snapshot], name: str) -> Html:
    title, unit = _FIGURES[name]
    curves: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for snapshot in snapshots:
        for kind, figures in by_kind(snapshot.matrices).items():
            if name in figures:
                curves[kind].append((snapshot.iteration, figures[name].median))
    series = [
        Series(short_name(kind), points, 1 + index % COLOURS, "dots")
        for index, (kind, points) in enumerate(curves.items())
    ]
    return draw(Chart(title, unit, series, run.resumed_after))


def _maps(matrices: Sequence[MatrixDiagnostics]) -> Iterator[Html]:
    """The first is open."""
    for name, (title, unit) in _FIGURES.items():
        yield element(
            "details",
            element("summary", element("b", title), f" {unit}"),
            _map(matrices, name),
            open="open" if name == "captured" else "",
        )


def _advice(snapshots: Sequence[Snapshot]) -> Iterator[Html]:
    """As `megatron-dion advise` prints it by default: of the second half."""
    advice = advise(snapshots[len(snapshots) // 2 :], _ENERGY)
    if advice.matrices:
        yield element(
            "details",
            element("summary", f"Ranks that would have captured {_ENERGY:.0%} of the energy"),
            element("pre", describe(advice)),
        )


def _map(matrices: Sequence[MatrixDiagnostics], name: str) -> Html:
    """A table of a figure over layers and kinds; of several experts, the median."""
    cells: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for matrix in matrices:
        if (value := getattr(matrix, name)) is not None:
            cells[layer_of(matrix.name), matrix.kind].append(value)
    values = {place: median(found) for place, found in cells.items()}
    kinds, layers = (dict.fromkeys(place[axis] for place in values) for axis in (1, 0))
    shade = _shade(values.values())
    rows = []
    for layer in layers:
        cells_of_layer = (_cell(values.get((layer, kind)), shade) for kind in kinds)
        rows.append(element("tr", element("th", layer, scope="row"), *cells_of_layer))
    return element("div", table(("layer", *map(_heading, kinds)), rows), class_="heat")


def _heading(kind: str) -> Html:
    """A kind's name, which may be broken between its parts and nowhere else."""
    parts = re.split(r"(?<=\.)|(?=\[)", short_name(kind))
    return Html(element("wbr").join(map(html.escape, parts)))


def _cell(value: float | None, shade: Callable[[float], float]) -> Html:
    style = "" if value is None else f"--shade:{shade(value):.0%}"
    return element("td", number(value), style=style)


def _shade(values: Collection[float]) -> Callable[[float], float]:
    """From 0 for the smallest value to 1 for the largest."""
    low, high = min(values), max(values)
    return lambda value: (value - low) / (high - low) if high > low else 0.0


def _matrices(matrices: Sequence[MatrixDiagnostics]) -> Html:
    rows = (
        row(
            element("code", matrix.name),
            f"{matrix.rows} × {matrix.columns}",
            str(matrix.rank),
            *(number(getattr(matrix, name)) for name in _FIGURES),
            number(None if matrix.owner_seconds is None else 1000 * matrix.owner_seconds),
        )
        for matrix in matrices
    )
    titles = (title.lower() for title, _ in _FIGURES.values())
    return table(("name", "size", "rank", *titles, "owner’s ms"), rows)


def layer_of(name: str) -> str:
    """The number of a matrix's layer."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return found[1] if found else _NO_LAYER


def short_name(kind: str) -> str:
    """A kind of matrix as it is called where there is little room."""
    return kind.removeprefix("decoder.layers.*.").replace(".weight", "").replace("self_", "")
