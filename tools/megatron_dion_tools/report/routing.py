"""Of the report: which optimizer has which parameter, and why."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from megatron_dion.optimizer.rules import without_numbers
from megatron_dion_tools.report.folder import Route, RunFolder
from megatron_dion_tools.report.pages import Html, element, row, table

_DION = "dion"
_NONE = "–"

Key = TypeVar("Key", bound=Hashable)


def routing(run: RunFolder) -> list[Html]:
    """Sums, a line for each kind of matrix or parameter, and all of them."""
    if not run.routes:
        return [element("p", _why_none(run), class_="none")]
    return [
        _sums(run.routes),
        element("h3", "By kind, layers and experts together"),
        _kinds(run.routes),
        element(
            "details",
            element("summary", f"All {len(run.routes):,} matrices and parameters"),
            _all(run.routes),
            class_="searched",
        ),
    ]


def _why_none(run: RunFolder) -> str:
    optimizer = run.arguments.optimizer
    if optimizer == _DION:
        return "There is no routing.tsv: the run ended before its optimizer was built."
    return f"Only runs with Dion have a routing; this one has --optimizer {optimizer}."


def _sums(routes: Iterable[Route]) -> Html:
    whole = sum(route.numel for route in routes)
    rows = []
    for optimizer, some in _grouped(routes, lambda route: route.optimizer).items():
        numbers = sum(route.numel for route in some)
        parameters = len({route.parameter for route in some})
        matrices = sum(bool(route.matrix) for route in some)
        counts = (parameters, matrices, numbers)
        rows.append(row(optimizer, *map(_count, counts), f"{numbers / whole:.1%}"))
    headings = ("optimizer", "parameters", "logical matrices", "numbers", "share")
    return table(headings, rows)


def _kinds(routes: Iterable[Route]) -> Html:
    rows = [
        row(
            _code(name),
            _size(some[0]),
            _count(some[0].rank),
            some[0].optimizer,
            some[0].reason,
            _count(len(some)),
            _count(sum(route.numel for route in some)),
        )
        for (name, *_), some in _grouped(routes, _kind).items()
    ]
    return table(("name", "size", "rank", "optimizer", "why", "how many", "numbers"), rows)


def _all(routes: Iterable[Route]) -> Html:
    rows = (
        row(_code(route.name), _size(route), _count(route.rank), route.optimizer, route.reason)
        for route in routes
    )
    return table(("name", "size", "rank", "optimizer", "why"), rows)


def _kind(route: Route) -> tuple[Hashable, ...]:
    name = without_numbers(route.name)
    return name, route.size or route.shape, route.rank, route.optimizer, route.reason


def _grouped[Key: Hashable](
    routes: Iterable[Route], key: Callable[[Route], Key]
) -> dict[Key, list[Route]]:
    groups: defaultdict[Key, list[Route]] = defaultdict(list)
    for route in routes:
        groups[key(route)].append(route)
    return groups


def _size(route: Route) -> str:
    return " × ".join(map(str, route.size or route.shape))


def _count(number: int) -> str:
    return f"{number:,}" if number else _NONE


def _code(name: Hashable) -> Html:
    return element("code", str(name))
