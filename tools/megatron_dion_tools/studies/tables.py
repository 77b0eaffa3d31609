"""What a study found, in Markdown."""

import math
from collections.abc import Iterable

from megatron_dion_tools.studies.results import (
    SMOOTHED_OVER,
    CellResult,
    Comparison,
    Rate,
    Spread,
    StudyResult,
)


def page(result: StudyResult) -> str:
    """The question, a table for each setting, what the columns mean, and how to do it again."""
    study = result.study
    parts = [f"# {study.name}", study.question]
    for setting in study.settings:
        parts += [_heading(result, setting), _facts(result, setting), _table(result, setting)]
    parts += [_legend(result), _commands(result)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _commands(result: StudyResult) -> str:
    lines = (
        "<!-- tests in: tests/unit/test_studies.py -->",
        "```bash tested",
        *result.commands,
        "```",
    )
    return "\n".join(lines)


def _heading(result: StudyResult, setting: str) -> str:
    return f"## {result.study.axis} {setting}" if setting else ""


def _facts(result: StudyResult, setting: str) -> str:
    cell = result.cell(setting, result.reference)
    seeds = result.study.seeds
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    return f"{cell.steps} steps, {cell.tokens} tokens, {named}."


def _table(result: StudyResult, setting: str) -> str:
    header = ["method", "best `--lr`", "validation loss"]
    if result.study.baseline:
        header += [f"minus {result.study.baseline}", f"steps to {result.study.baseline}'s loss"]
    header += ["optimizer ms", "iteration ms", "validation loss by `--lr`, first seed"]
    rows = [_row(result, result.cell(setting, method)) for method in result.study.methods]
    return "\n".join(map(_line, [header, ["---"] * len(header), *rows]))


def _row(result: StudyResult, cell: CellResult) -> list[str]:
    star = "" if cell.is_bracketed else "\\*"
    row = [cell.method, f"{cell.best_lr:g}{star}", _loss_and_sd(cell.validation_loss)]
    if result.study.baseline:
        row += _compared(cell.comparison)
    row += [f"{1000 * cell.optimizer_seconds:.1f}", f"{1000 * cell.iteration_seconds:.0f}"]
    first_seed = result.study.seeds[0]
    return [*row, "; ".join(_rate(rate, first_seed) for rate in cell.rates)]


def _compared(comparison: Comparison | None) -> list[str]:
    """Difference with its interval, and steps to the baseline's loss in percent."""
    if comparison is None:
        return ["", ""]
    return [_difference(comparison), _steps(comparison)]


def _difference(comparison: Comparison) -> str:
    mean = comparison.difference.mean
    if not math.isfinite(mean):
        return "diverged"
    known = math.isfinite(comparison.margin)
    return f"{mean:+.3f}" + (f" ± {comparison.margin:.3f}" if known else "")


def _steps(comparison: Comparison) -> str:
    shares = comparison.step_shares.values()
    reached = [share for share in shares if share is not None]
    if not reached:
        return "never"
    if len(reached) < len(comparison.step_shares):
        return f"reached by {len(reached)} of {len(comparison.step_shares)} seeds"
    mean, sd = comparison.step_share.mean, comparison.step_share.sd
    return f"{100 * mean:.0f} %" + (f" ± {100 * sd:.0f}" if math.isfinite(sd) else "")


def _loss_and_sd(loss: Spread) -> str:
    return _loss(loss.mean) + (f" ± {loss.sd:.3f}" if math.isfinite(loss.sd) else "")


def _rate(rate: Rate, seed: int) -> str:
    return f"{rate.lr:g}: {_loss(rate.validation_loss[seed])}"


def _loss(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _legend(result: StudyResult) -> str:
    study = result.study
    several = len(study.seeds) > 1
    over_seeds = ", mean ± standard deviation over seeds" if several else ""
    lines = [
        "* best `--lr`: lowest validation loss with the first seed. With \\*, it is the lowest or "
        "the highest that was tried.",
        f"* validation loss: in nats per token, after the last step{over_seeds}.",
    ]
    if study.baseline:
        interval = ", mean and half of its 95 % t interval" if several else ""
        lines += [
            f"* minus {study.baseline}: validation loss less that of {study.baseline} with the "
            f"same seed{interval}.",
            f"* steps to {study.baseline}'s loss: the first step from which on the training loss "
            f"(mean of {SMOOTHED_OVER} steps) stays at or below the last one of {study.baseline} "
            f"with the same seed, in percent of all steps{over_seeds}.",
        ]
    lines.append("* optimizer ms, iteration ms: median per step, on a machine shared by runs.")
    return "\n".join(lines)
