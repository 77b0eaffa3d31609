"""The page about a run: what became of it, and a section for each thing that is known of it."""

import math
from collections.abc import Iterable, Iterator, Sequence

from megatron_dion.megatron.progress import human_count, human_duration
from megatron_dion_tools.report.charts import number
from megatron_dion_tools.report.curves import curves, points_of, throughput
from megatron_dion_tools.report.diagnostics import diagnostics
from megatron_dion_tools.report.environment import environment
from megatron_dion_tools.report.folder import RunFolder
from megatron_dion_tools.report.pages import Html, document, element
from megatron_dion_tools.report.plan import plan
from megatron_dion_tools.report.routing import routing
from megatron_dion_tools.report.script import SCRIPT
from megatron_dion_tools.report.style import STYLE

_LAST = 10
"""Iterations over which the training loss at the end is averaged."""
_MOST_NAMED = 5


def render(run: RunFolder) -> str:
    """One page about a run, that needs nothing else."""
    sections: dict[str, Iterable[Html]] = {
        "Curves": [element("div", *curves(run), class_="charts")],
        "Throughput": [element("div", *throughput(run), class_="charts")],
        "Routing": routing(run),
        "Plan": plan(run),
        "Diagnostics": diagnostics(run),
        "Environment": environment(run),
    }
    return document(
        f"Run {run.path.resolve().name}",
        element("p", _verdict(run), class_="verdict"),
        *(element("p", note, class_="note") for note in notes(run)),
        _facts(run),
        element("nav", *(element("a", name, href=f"#{name.lower()}") for name in sections)),
        *(_section(name, content) for name, content in sections.items()),
        style=STYLE,
        script=SCRIPT,
    )


def notes(run: RunFolder) -> Iterator[str]:
    """What one should know before one looks at curves."""
    if run.is_cut:
        yield "The last line of metrics.jsonl is cut off: the run was killed, or it is writing."
    if broken := [i for i, loss in points_of(run.training, "lm_loss") if not math.isfinite(loss)]:
        yield f"The training loss is not finite in {_iterations(broken)}."
    if skipped := [record["iteration"] for record in run.training if record.get("skipped")]:
        yield f"The step was skipped in {_iterations(skipped)}, for gradients that were not finite."
    if run.training and run.training[0]["iteration"] > 1:
        first = run.training[0]["iteration"]
        yield f"The curves begin at iteration {first}: what was before is in another run directory."
    for iteration in run.resumed_after:
        yield f"The run was resumed after iteration {iteration:,}."
    if fallbacks := max((r.get("householder_fallbacks") or 0 for r in run.training), default=0):
        yield (
            f"Cholesky factorizations broke down {fallbacks:,} times on the last rank, which then"
            " took Householder QR."
        )


def _verdict(run: RunFolder) -> str:
    planned = run.arguments.train_iters
    if not run.training:
        return "No iteration was recorded: it has not begun, or it ended before. Its log says why."
    last = run.training[-1]["iteration"]
    of = f"iteration {last:,}" + (f" of {planned:,}" if planned else "")
    if not planned or last >= planned:
        return f"Finished: {of}."
    return f"Unfinished: {of}. It is still running, or it was stopped."


def _facts(run: RunFolder) -> Html:
    """The figures that one asks for first."""
    facts = {"optimizer": _optimizer(run), **_losses(run), **_speed(run)}
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value))
            for name, value in facts.items()
        ),
        class_="facts",
    )


def _optimizer(run: RunFolder) -> str:
    args = run.arguments
    if args.optimizer != "dion":
        return str(args.optimizer)
    return f"dion, rank fraction {args.dion_rank_fraction:g}"


def _losses(run: RunFolder) -> dict[str, str]:
    found = {}
    if losses := [loss for _, loss in points_of(run.training, "lm_loss")][-_LAST:]:
        found[f"training loss, mean of {len(losses)}"] = number(sum(losses) / len(losses))
    if validation := points_of(run.of_kind("validation"), "lm_loss"):
        found["validation loss"] = number(validation[-1][1])
    return found


def _speed(run: RunFolder) -> dict[str, str]:
    if not run.training:
        return {}
    seconds = sum(record["iteration_seconds"] for record in run.training)
    step = sum(record["optimizer_seconds"] for record in run.training)
    return {
        "tokens trained here": human_count(sum(session.tokens for session in run.sessions)),
        "tokens per second": human_count(run.sessions[-1].tokens_per_second),
        "in training steps": human_duration(seconds),
        "of it in the optimizer": f"{step / seconds:.1%}",
    }


def _section(name: str, content: Iterable[Html]) -> Html:
    return element("section", element("h2", name), *content, id=name.lower())


def _iterations(found: Sequence[float]) -> str:
    if len(found) == 1:
        return f"iteration {found[0]:,}"
    named = ", ".join(f"{iteration:,}" for iteration in found[:_MOST_NAMED])
    more = f" and {len(found) - _MOST_NAMED:,} more" if len(found) > _MOST_NAMED else ""
    return f"iterations {named}{more}"
