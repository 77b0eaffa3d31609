"""One table and one verdict from the findings of all ranks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron_dion_tools.doctor.checks import FAILED, OK, VERDICTS, WARNING, Finding


class Row(NamedTuple):
    """A line of the table: the finding of a check on some ranks."""

    check: str
    ranks: list[int]
    finding: Finding


def merge(findings: Mapping[int, Mapping[str, Finding]]) -> list[Row]:
    """Return the rows of findings by rank and check; those of a check begin with the worst verdict.

    Ranks on which a check is fine share a row, and so do ranks with the same other finding.
    """
    rows = []
    for check in dict.fromkeys(name for of_rank in findings.values() for name in of_rank):
        mine = {rank: of[check] for rank, of in sorted(findings.items()) if check in of}
        differ = len({finding.text for finding in mine.values()}) > 1
        groups: dict[object, Row] = {}
        for rank, finding in mine.items():
            if finding.same and differ:
                fix = "give all ranks the same image or environment"
                finding = Finding(FAILED, finding.text, fix)
            group = OK if finding.verdict == OK else finding
            groups.setdefault(group, Row(check, [], finding)).ranks.append(rank)
        rows += sorted(groups.values(), key=lambda row: -VERDICTS.index(row.finding.verdict))
    return rows


def worst(rows: Iterable[Row]) -> str:
    """Return the worst verdict of all rows."""
    return max((row.finding.verdict for row in rows), key=VERDICTS.index, default=OK)


def table(rows: Sequence[Row]) -> str:
    """Return the rows in columns, what to do below them, and last the verdict of all."""
    cells = [("check", "verdict", "ranks", "finding")]
    cells += [(row.check, row.finding.verdict, ranges(row.ranks), row.finding.text) for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)] + [0]
    lines = []
    for cell, fix in zip(cells, ["", *(row.finding.fix for row in rows)], strict=True):
        padded = (f"{text:{width}}" for text, width in zip(cell, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
        if fix:
            lines.append(" " * (sum(widths) + 6) + f"-> {fix}")
    parts = []
    for verdict in (FAILED, WARNING):
        names = dict.fromkeys(row.check for row in rows if row.finding.verdict == verdict)
        parts += [f"{verdict}: {', '.join(names)}"] if names else []
    return "\n".join([*lines, f"verdict: {'; '.join(parts) or OK}"])


def ranges(ranks: Iterable[int]) -> str:
    """Return ranks as ranges, for example `0-2, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
