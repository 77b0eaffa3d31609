"""What became of cases, as a page to look at and as lines for a terminal."""

import base64
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from megatron_dion.convergence.checks import Verdict, without_seed
from megatron_dion.convergence.environment import Environment, difference
from megatron_dion.convergence.evaluation import Outcome
from megatron_dion.convergence.pictures import draw_case, draw_comparison, draw_controls, png

_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1c1c1e; --page: #ffffff; --faint: #6a6a70; --line: #d8d8de; --shade: #f4f4f7;
  --good: #00704f; --bad: #b3261e; --bad-shade: #fdecea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e8e8ec; --page: #17171a; --faint: #a0a0a8; --line: #3a3a42; --shade: #222228;
    --good: #4fcf9f; --bad: #ff8a80; --bad-shade: #3a1f1d;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.7rem; margin-bottom: 0; }
h2 { font-size: 1.3rem; border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1.5rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
a { color: inherit; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-size: .92em; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; }
.good, .bad { font-weight: 600; white-space: nowrap; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.wrong { background: var(--bad-shade); }
img { display: block; width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; margin: 1rem 0; }
details { margin: .8rem 0; background: var(--shade); border-radius: 6px; padding: .5rem .9rem; }
summary { cursor: pointer; }
details td, code { overflow-wrap: anywhere; }
code { font-size: .92em; }
@media print {
  @page { margin: 1.2cm; }
  body { max-width: none; margin: 0; padding: 0; font-size: 8.5pt; }
  img { max-height: 24cm; object-fit: contain; }
  img, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


@dataclass(frozen=True)
class Section:
    """What the page says about a case.

    Attributes:
        outcome: what became of it.
        golden: the environment in which its golden curves were made.
        here: this machine, and the data of the case.
        commands: the flags of each run, by its name.
    """

    outcome: Outcome
    golden: Environment
    here: Environment
    commands: Mapping[str, str]


def render(sections: Sequence[Section]) -> str:
    """One page about one case or more, that needs nothing else."""
    outcomes = [section.outcome for section in sections]
    heading = f"Convergence: {_count(outcomes)}"
    return _document(heading, _overview(outcomes), *map(_case, sections))


def render_comparison(verdicts: Sequence[Verdict]) -> str:
    """One page about runs that were compared with the first of them."""
    failed = sum(not verdict.passed for verdict in verdicts)
    heading = f"Comparison: {failed} of {len(verdicts)} differ" if failed else "Comparison: alike"
    picture = _picture(draw_comparison(verdicts), "curves and their differences")
    return _document(heading, _verdicts(verdicts), picture)


def _document(heading: str, *content: str) -> str:
    page = _element(
        "html",
        _element(
            "head",
            _element("meta", charset="utf-8"),
            _element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            _element("title", heading),
            _element("style", _Html(_STYLE)),
        ),
        _element("body", _element("h1", heading), *content),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def text(outcomes: Sequence[Outcome]) -> str:
    """A line for each verdict, failures first, and a line that sums up."""
    lines = [
        (passed, f"{outcome.case.name}: {line}")
        for outcome in outcomes
        for passed, line in _verdict_lines(outcome)
    ]
    failed = [f"FAILED  {line}" for passed, line in lines if not passed]
    fine = [f"passed  {line}" for passed, line in lines if passed]
    return "".join(f"{line}\n" for line in [*failed, *fine, _summary(outcomes)])


def verdict_line(verdict: Verdict) -> str:
    """What a check found."""
    return f"{verdict.check}: {verdict.quantity}: {verdict.finding}"


def _verdict_lines(outcome: Outcome) -> Iterator[tuple[bool, str]]:
    """Each line, and whether all is as it should be."""
    for verdict in outcome.verdicts:
        yield verdict.passed, verdict_line(verdict)
    for control in outcome.controls:
        noticed = "NOT NOTICED" if control.passed else "noticed"
        yield not control.passed, f"mistake {_mistake(control)} {noticed}: {verdict_line(control)}"


def _summary(outcomes: Sequence[Outcome]) -> str:
    verdicts = [verdict for outcome in outcomes for verdict in outcome.verdicts]
    controls = [control for outcome in outcomes for control in outcome.controls]
    parts = [
        _count(outcomes),
        f"{sum(v.passed for v in verdicts)} of {len(verdicts)} checks passed",
        f"{sum(not c.passed for c in controls)} of {len(controls)} mistakes noticed",
    ]
    return "; ".join(parts if controls else parts[:2])


def _count(outcomes: Sequence[Outcome]) -> str:
    failed = sum(not outcome.passed for outcome in outcomes)
    cases = "case" if len(outcomes) == 1 else "cases"
    return f"{len(outcomes)} {cases}, {len(outcomes) - failed} passed, {failed} failed"


def _mistake(control: Verdict) -> str:
    return without_seed(next(iter(control.curves)))


class _Html(str):
    """Markup; any other text is escaped before it gets into the page."""


def _element(tag: str, /, *children: str, **attributes: str) -> _Html:
    inner = "".join(c if isinstance(c, _Html) else html.escape(c) for c in children)
    names = "".join(
        f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items() if value
    )
    return _Html(f"<{tag}{names}>" if tag in ("img", "meta") else f"<{tag}{names}>{inner}</{tag}>")


def _table(headings: Sequence[str], rows: Iterable[_Html]) -> _Html:
    top = _element("tr", *(_element("th", heading, scope="col") for heading in headings))
    return _element("table", _element("thead", top), _element("tbody", *rows))


def _row(*cells: str, wrong: bool = False) -> _Html:
    columns = (_element("td", cell) for cell in cells)
    return _element("tr", *columns, class_="wrong" if wrong else "")


def _status(good: bool, if_good: str = "passed", if_bad: str = "FAILED") -> _Html:
    if good:
        return _element("span", f"✓ {if_good}", class_="good")
    return _element("span", f"✗ {if_bad}", class_="bad")


def _noticed(controls: Sequence[Verdict]) -> str:
    return f"{sum(not c.passed for c in controls)} of {len(controls)}" if controls else "–"


def _iteration(verdict: Verdict) -> str:
    return "–" if verdict.divergent is None else str(verdict.divergent)


def _overview(outcomes: Sequence[Outcome]) -> _Html:
    rows = []
    for outcome in outcomes:
        name = outcome.case.name
        lines = [line for passed, line in _verdict_lines(outcome) if not passed]
        rows.append(
            _row(
                _element("a", name, href=f"#{name}"),
                _status(outcome.passed),
                f"{sum(v.passed for v in outcome.verdicts)} of {len(outcome.verdicts)}",
                _noticed(outcome.controls),
                next(iter(lines), "–"),
                wrong=not outcome.passed,
            )
        )
    headings = ("case", "verdict", "checks passed", "mistakes noticed", "first failure")
    return _table(headings, rows)


def _case(section: Section) -> _Html:
    outcome = section.outcome
    name = outcome.case.name
    parts = [
        _element("h2", f"{name} ", _status(outcome.passed), id=name),
        _element("p", outcome.case.description),
    ]
    if outcome.verdicts:
        parts += [_verdicts(outcome.verdicts), _picture(draw_case(outcome), f"curves of {name}")]
    if (controls := draw_controls(outcome)) is not None:
        parts += [
            _element("h3", "Runs with a known mistake, which checks must notice"),
            _controls(outcome.controls),
            _picture(controls, f"curves of the runs of {name} that have a mistake"),
        ]
    parts += [_environments(section.golden, section.here), _commands(section.commands)]
    return _element("section", *parts)


def _verdicts(verdicts: Sequence[Verdict]) -> _Html:
    rows = (
        _row(
            verdict.check,
            verdict.quantity,
            _status(verdict.passed),
            _iteration(verdict),
            verdict.finding,
            wrong=not verdict.passed,
        )
        for verdict in verdicts
    )
    headings = ("check", "quantity", "verdict", "first divergent iteration", "finding")
    return _table(headings, rows)


def _controls(controls: Sequence[Verdict]) -> _Html:
    rows = (
        _row(
            _mistake(control),
            _status(not control.passed, "noticed", "NOT NOTICED"),
            _iteration(control),
            control.check,
            control.quantity,
            control.finding,
            wrong=control.passed,
        )
        for control in controls
    )
    return _table(("mistake", "verdict", "at iteration", "by check", "quantity", "finding"), rows)


def _picture(figure: Figure, description: str) -> _Html:
    content = base64.b64encode(png(figure)).decode()
    return _element("img", src=f"data:image/png;base64,{content}", alt=description)


def _environments(golden: Environment, here: Environment) -> _Html:
    rows = (
        _row(
            name,
            golden.get(name) or "–",
            here.get(name) or "–",
            wrong=golden.get(name) != here.get(name),
        )
        for name in dict.fromkeys([*golden, *here])
    )
    differs = difference(golden, here)
    judged = (
        f"golden curves need not repeat bit for bit: {differs}"
        if differs
        else ("golden curves must repeat bit for bit")
    )
    return _element(
        "details",
        _element("summary", f"Environment: {judged}"),
        _table(("", "of the golden curves", "here"), rows),
    )


def _commands(commands: Mapping[str, str]) -> _Html:
    rows = (_row(run, _element("code", flags)) for run, flags in commands.items())
    return _element(
        "details", _element("summary", "Flags of each run"), _table(("run", "flags"), rows)
    )
