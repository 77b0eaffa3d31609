"""What became of cases, as a page to look at and as lines for a terminal."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from megatron_dion_tools.convergence.checks import Verdict, without_seed
from megatron_dion_tools.convergence.environment import Environment, difference
from megatron_dion_tools.convergence.evaluation import Outcome
from megatron_dion_tools.convergence.pictures import draw_case, draw_comparison, draw_controls, png
from megatron_dion_tools.report.pages import Html, document, element, row, table


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
    return document(heading, _overview(outcomes), *map(_case, sections))


def render_comparison(verdicts: Sequence[Verdict]) -> str:
    """One page about runs that were compared with the first of them."""
    failed = sum(not verdict.passed for verdict in verdicts)
    heading = f"Comparison: {failed} of {len(verdicts)} differ" if failed else "Comparison: alike"
    picture = _picture(draw_comparison(verdicts), "curves and their differences")
    return document(heading, _verdicts(verdicts), picture)


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


def _status(good: bool, if_good: str = "passed", if_bad: str = "FAILED") -> Html:
    if good:
        return element("span", f"✓ {if_good}", class_="good")
    return element("span", f"✗ {if_bad}", class_="bad")


def _noticed(controls: Sequence[Verdict]) -> str:
    return f"{sum(not c.passed for c in controls)} of {len(controls)}" if controls else "–"


def _iteration(verdict: Verdict) -> str:
    return "–" if verdict.divergent is None else str(verdict.divergent)


def _overview(outcomes: Sequence[Outcome]) -> Html:
    rows = []
    for outcome in outcomes:
        name = outcome.case.name
        lines = [line for passed, line in _verdict_lines(outcome) if not passed]
        rows.append(
            row(
                element("a", name, href=f"#{name}"),
                _status(outcome.passed),
                f"{sum(v.passed for v in outcome.verdicts)} of {len(outcome.verdicts)}",
                _noticed(outcome.controls),
                next(iter(lines), "–"),
                wrong=not outcome.passed,
            )
        )
    headings = ("case", "verdict", "checks passed", "mistakes noticed", "first failure")
    return table(headings, rows)


def _case(section: Section) -> Html:
    outcome = section.outcome
    name = outcome.case.name
    parts = [
        element("h2", f"{name} ", _status(outcome.passed), id=name),
        element("p", outcome.case.description),
    ]
    if outcome.verdicts:
        parts += [_verdicts(outcome.verdicts), _picture(draw_case(outcome), f"curves of {name}")]
    if (controls := draw_controls(outcome)) is not None:
        parts += [
            element("h3", "Runs with a known mistake, which checks must notice"),
            _controls(outcome.controls),
            _picture(controls, f"curves of the runs of {name} that have a mistake"),
        ]
    parts += [_environments(section.golden, section.here), _commands(section.commands)]
    return element("section", *parts)


def _verdicts(verdicts: Sequence[Verdict]) -> Html:
    rows = (
        row(
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
    return table(headings, rows)


def _controls(controls: Sequence[Verdict]) -> Html:
    rows = (
        row(
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
    return table(("mistake", "verdict", "at iteration", "by check", "quantity", "finding"), rows)


def _picture(figure: Figure, description: str) -> Html:
    content = base64.b64encode(png(figure)).decode()
    return element("img", src=f"data:image/png;base64,{content}", alt=description)


def _environments(golden: Environment, here: Environment) -> Html:
    rows = (
        row(
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
    return element(
        "details",
        element("summary", f"Environment: {judged}"),
        table(("", "of the golden curves", "here"), rows),
    )


def _commands(commands: Mapping[str, str]) -> Html:
    rows = (row(run, element("code", flags)) for run, flags in commands.items())
    return element(
        "details", element("summary", "Flags of each run"), table(("run", "flags"), rows)
    )
