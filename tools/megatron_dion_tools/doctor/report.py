"""One table and one verdict from the findings of all ranks."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron_dion_tools.doctor.findings import FAILED, OK, VERDICTS, WARNING, Finding


class Row(NamedTuple):
    """A line of the table: the finding of a check on some ranks."""

    check: str
    ranks: Sequence[int]
    finding: Finding


def merge(findings: Mapping[int, Mapping[str, Finding]]) -> list[Row]:
    """Return the rows of all checks; those of one check begin with the worst verdict.

    Ranks on which a check is fine share a row, and so do ranks with the same other finding.

    Args:
        findings: By rank, then by the name of the check.
    """
    by_check: dict[str, dict[int, Finding]] = defaultdict(dict)
    for rank, of_rank in sorted(findings.items()):
        for check, finding in of_rank.items():
            by_check[check][rank] = finding
    return [row for check, of_check in by_check.items() for row in _rows(check, of_check)]


def _rows(check: str, findings: Mapping[int, Finding]) -> list[Row]:
    differ = len({finding.text for finding in findings.values()}) > 1
    groups: dict[Finding, list[int]] = {}
    fine: list[int] = []
    for rank, finding in findings.items():
        if finding.verdict != OK:
            groups.setdefault(finding, []).append(rank)
        elif differ and finding.same:
            fix = "give all ranks the same image or environment"
            groups.setdefault(Finding(FAILED, finding.text, fix), []).append(rank)
        else:
            fine.append(rank)
    rows = [Row(check, ranks, finding) for finding, ranks in groups.items()]
    rows += [Row(check, fine, findings[fine[0]])] if fine else []
    return sorted(rows, key=lambda row: -VERDICTS.index(row.finding.verdict))


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
