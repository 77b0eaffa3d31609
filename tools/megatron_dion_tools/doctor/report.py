"""From what each rank found to one table and one verdict."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dion_tools.doctor.findings import Finding, Verdict
from megatron_dion_tools.doctor.links import Link
from megatron_dion_tools.doctor.ranks import in_numbers


@dataclass
class RankReport:
    """What one rank sends to rank 0.

    Attributes:
        host: The name of its machine.
        clock: Its time at the moment when all ranks had met; None if they did not.
        findings: Of its checks.
        links: That it has timed.
    """

    host: str
    clock: float | None = None
    findings: list[Finding] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)

    def to_json(self) -> str:
        """Write it as one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        """Read what `to_json` wrote."""
        content = json.loads(text)
        content["findings"] = [
            Finding(**one | {"verdict": Verdict(one["verdict"])}) for one in content["findings"]
        ]
        content["links"] = [Link(**one) for one in content["links"]]
        return cls(**content)


@dataclass(frozen=True)
class Row:
    """A line of the table: what some ranks have in common."""

    name: str
    verdict: Verdict
    ranks: tuple[int, ...]
    found: str
    fix: str = ""


def merge(reports: Mapping[int, RankReport]) -> list[Row]:
    """Put together what ranks say alike, check by check.

    Args:
        reports: By rank.
    """
    by_name: dict[str, dict[int, Finding]] = defaultdict(dict)
    for rank, report in sorted(reports.items()):
        for finding in report.findings:
            by_name[finding.name][rank] = finding
    return [row for findings in by_name.values() for row in _rows(findings)]


def row_of(finding: Finding, ranks: Sequence[int]) -> Row:
    """Make a row of a finding that holds for these ranks."""
    return Row(finding.name, finding.verdict, tuple(ranks), finding.found, finding.fix)


def worst(rows: Sequence[Row]) -> Verdict:
    """Return the verdict on all together."""
    return max((row.verdict for row in rows), key=lambda verdict: verdict.badness)


def table(rows: Sequence[Row]) -> str:
    """Lay out rows, each with its fix below it, and the verdict as the last line."""
    cells = [("check", "verdict", "ranks", "finding")]
    cells += [(row.name, row.verdict, in_numbers(row.ranks), row.found) for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)]
    lines = []
    for cell, fix in zip(cells, ["", *(row.fix for row in rows)], strict=True):
        padded = (f"{text:{width}}" for text, width in zip(cell, [*widths, 0], strict=True))
        lines.append("  ".join(padded).rstrip())
        if fix:
            lines.append(" " * (sum(widths) + 2 * 3) + f"-> {fix}")
    return "\n".join([*lines, _last_line(rows)])


def to_json(rows: Sequence[Row], reports: Mapping[int, RankReport]) -> str:
    """Write the same for programs, with the numbers of every link."""
    content: dict[str, Any] = {
        "verdict": worst(rows),
        "hosts": {rank: report.host for rank, report in reports.items()},
        "findings": [dataclasses.asdict(row) for row in rows],
        "links": [dataclasses.asdict(one) for report in reports.values() for one in report.links],
    }
    return json.dumps(content, indent=2) + "\n"


def _rows(findings: Mapping[int, Finding]) -> list[Row]:
    """One row for all ranks that are fine, and one for each other answer; the worst comes first."""
    differ = len({finding.found for finding in findings.values()}) > 1
    if differ and any(finding.alike for finding in findings.values()):
        findings = {rank: _reproached(finding) for rank, finding in findings.items()}
    groups: dict[Finding | Verdict, list[int]] = defaultdict(list)
    for rank, finding in findings.items():
        groups[Verdict.OK if finding.verdict is Verdict.OK else finding].append(rank)
    rows = [row_of(findings[ranks[0]], ranks) for ranks in groups.values()]
    return sorted(rows, key=lambda row: -row.verdict.badness)


def _reproached(finding: Finding) -> Finding:
    """What is fine by itself is not if other ranks have something else."""
    if finding.verdict is not Verdict.OK:
        return finding
    fix = "give all ranks the same image or environment"
    return dataclasses.replace(finding, verdict=Verdict.FAILED, fix=fix)


def _last_line(rows: Sequence[Row]) -> str:
    named = {
        verdict: list(dict.fromkeys(row.name for row in rows if row.verdict is verdict))
        for verdict in (Verdict.FAILED, Verdict.WARNING)
    }
    parts = [f"{verdict}: {', '.join(names)}" for verdict, names in named.items() if names]
    return f"verdict: {'; '.join(parts) or 'ok'}"
