"""Reads a run's diagnostics and says which rank fraction would have captured 90 % of the energy.

Of a matrix (m, n) a step knows the total energy E = ||B||_F^2 and the energies of R = B P, which
are squares of its singular values. The k largest are no more than the k largest of B's, so a count
of directions that has a share of E here is at least as many as the best directions need.

Where all r directions have a smaller share c, the rest (1 - c) E is in B (I - P P^T). Its rank is
at most d = min(m, n) - r, since P lies in the row space of B. Of d directions the best j have at
least j / d of it. So the share s is reached with at most r + ceil(d (s - c) / (1 - c)) directions:
exactly so many if the rest were spread evenly, fewer if it falls off. That is an upper bound, not
an extrapolation.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_dion.megatron.run_directory import read_metrics
from megatron_dion.optimizer.diagnostics import (
    ENERGY_LEVELS,
    MatrixDiagnostics,
    Snapshot,
    read_diagnostics,
)
from megatron_dion_tools.errors import ToolError

DESCRIPTION = (
    "Say which rank fraction would have captured a share of the energy of B = M + G, from what a"
    " run with --dion-log-interval measured."
)
_SHARES_OF_PARAMETERS = (0.5, 0.75, 0.9, 1.0)


class AdvisorError(Exception):
    """There is nothing to read."""


@dataclass(frozen=True)
class Need:
    """How many directions have the wanted share of a matrix's energy.

    Attributes:
        directions: so many, or at most so many.
        is_bound: whether it is the upper bound of the module's docstring.
    """

    directions: int
    is_bound: bool


@dataclass(frozen=True)
class MatrixAdvice:
    """Of one matrix, over the snapshots.

    Attributes:
        last: its last diagnostics.
        energy: median of the share of the energy that was captured.
        stable_rank: median.
        need: of the middle one of the snapshots, in the order of needs.
    """

    last: MatrixDiagnostics
    energy: float
    stable_rank: float
    need: Need

    @property
    def smaller_side(self) -> int:
        return min(self.last.rows, self.last.columns)

    @property
    def fraction(self) -> float:
        """The need as a rank fraction."""
        return self.need.directions / self.smaller_side


@dataclass(frozen=True)
class Advice:
    """What a run's diagnostics say about its ranks.

    Attributes:
        level: the wanted share of the energy.
        iterations: of the snapshots that were read.
        matrices: those with any energy.
        idle: number of matrices without.
    """

    level: float
    iterations: tuple[int, ...]
    matrices: tuple[MatrixAdvice, ...]
    idle: int

    def fraction_for(self, share: float) -> MatrixAdvice:
        """The matrix whose need is enough for the matrices that hold a share of all parameters."""
        ordered = sorted(self.matrices, key=lambda found: found.fraction)
        sizes = [found.last.rows * found.last.columns for found in ordered]
        held = 0
        for found, size in zip(ordered, sizes, strict=True):
            held += size
            if held >= share * sum(sizes):
                return found
        raise AssertionError("all matrices together hold all parameters")


def need_of(matrix: MatrixDiagnostics, level: float) -> Need | None:
    """What a matrix needed in one step; None if it had no energy."""
    if matrix.captured is None:
        return None
    directions = matrix.energy_ranks[ENERGY_LEVELS.index(level)]
    if directions is not None:
        return Need(directions, is_bound=False)
    captured = min(matrix.captured**2, level)  # it has fewer digits than what it was compared with
    left = min(matrix.rows, matrix.columns) - matrix.rank
    # A whole number of directions must not become one more by the rounding of `captured`.
    more = math.ceil(left * (level - captured) / (1 - captured) - 1e-3)
    return Need(matrix.rank + more, is_bound=True)


def advise(snapshots: Sequence[Snapshot], level: float) -> Advice:
    """Reads all of the given snapshots.

    Args:
        snapshots: at least one.
        level: the wanted share of the energy, one of `ENERGY_LEVELS`.
    """
    steps: defaultdict[str, list[MatrixDiagnostics]] = defaultdict(list)
    for snapshot in snapshots:
        for matrix in snapshot.matrices:
            steps[matrix.name].append(matrix)
    advised = [_advise_on(of_matrix, level) for of_matrix in steps.values()]
    known = tuple(found for found in advised if found is not None)
    iterations = tuple(snapshot.iteration for snapshot in snapshots)
    return Advice(level, iterations, known, len(advised) - len(known))


def _advise_on(steps: Sequence[MatrixDiagnostics], level: float) -> MatrixAdvice | None:
    needs = [need for step in steps if (need := need_of(step, level)) is not None]
    stable_ranks = [step.stable_rank for step in steps if step.stable_rank is not None]
    if not needs:
        return None
    return MatrixAdvice(
        last=steps[-1],
        energy=median(step.captured**2 for step in steps if step.captured is not None),
        stable_rank=median(stable_ranks) if stable_ranks else math.nan,
        need=sorted(needs, key=lambda need: (need.directions, need.is_bound))[len(needs) // 2],
    )


def describe(advice: Advice) -> str:
    """A table of the kinds of matrices, the fractions for the model, and how to take them."""
    first, last = advice.iterations[0], advice.iterations[-1]
    lines = [
        f"{len(advice.iterations)} measured steps of iterations {first} to {last},"
        f" {len(advice.matrices)} matrices",
        *([f"{advice.idle} matrices had no energy and are left out"] if advice.idle else []),
        "",
        *_table([_HEADER, *_rows(advice)]),
        "",
    ]
    if any(found.need.is_bound for found in advice.matrices):
        lines += [
            "<= needs more directions than the run has: at most so many, as if all energy that was",
            "   not captured were spread evenly over all other directions",
            "",
        ]
    lines.append(f"A rank fraction that would have captured {advice.level:.0%} of the energy:")
    for share in _SHARES_OF_PARAMETERS:
        where = "all matrices" if share == 1 else f"matrices with {share:.0%} of the parameters"
        lines.append(f"  {_fraction(advice.fraction_for(share)):>8} in {where}")
    if advice.fraction_for(0.5).need.is_bound:
        lines += [
            "The run's rank is too small to tell more: train some iterations with a larger"
            " --dion-rank-fraction, and ask again.",
        ]
    lines += [
        "",
        "Captured energy is not loss: docs/results.md has what ranks cost in loss. And B holds what"
        " earlier steps did not",
        "capture: a run with a smaller rank than this one's has more energy in more directions, and"
        " would need more than it says here.",
    ]
    return "\n".join(lines)


_HEADER = ("matrices", "number", "size", "rank", "energy", "stable rank", "least", "median", "most")


def _rows(advice: Advice) -> list[tuple[str, ...]]:
    kinds: defaultdict[tuple[str, int, int, int], list[MatrixAdvice]] = defaultdict(list)
    for found in advice.matrices:
        last = found.last
        kinds[last.kind, last.rows, last.columns, last.rank].append(found)
    rows = []
    for (kind, m, n, rank), alike in kinds.items():
        ordered = sorted(alike, key=lambda found: found.fraction)
        middle = ordered[len(ordered) // 2]
        rows.append(
            (
                *(kind, str(len(alike)), f"{m} x {n}", str(rank)),
                f"{median(found.energy for found in alike):.0%}",
                f"{median(found.stable_rank for found in alike):.1f}",
                *(_fraction(found) for found in (ordered[0], middle, ordered[-1])),
            )
        )
    return rows


def _fraction(found: MatrixAdvice) -> str:
    return f"{'<= ' if found.need.is_bound else ''}{_rounded_up(found.fraction):.2f}"


def _rounded_up(fraction: float) -> float:
    return math.ceil(fraction * 100 - 1e-9) / 100


def _table(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join(cells)


def read_run(run_dir: Path, first_iteration: int | None) -> list[Snapshot]:
    """The snapshots of a run from an iteration on; by default, of its second half.

    Raises:
        AdvisorError: there are none.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise AdvisorError(f"there is no {path}: give the --run-dir of a run")
    try:
        snapshots = read_diagnostics(read_metrics(path))
    except ValueError as error:
        raise AdvisorError(f"{path}: {error}") from error
    if not snapshots:
        raise AdvisorError(f"{path} has no diagnostics: train with --dion-log-interval N")
    start = snapshots[len(snapshots) // 2].iteration if first_iteration is None else first_iteration
    chosen = [snapshot for snapshot in snapshots if snapshot.iteration >= start]
    if not chosen:
        raise AdvisorError(
            f"--from-iteration {start} is after the last diagnostics, of iteration"
            f" {snapshots[-1].iteration}: give an earlier one"
        )
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the --run-dir of a run")
    parser.add_argument(
        "--energy",
        type=float,
        choices=ENERGY_LEVELS,
        default=0.9,
        help="the share of ||B||_F^2 to capture (0.9)",
    )
    parser.add_argument(
        "--from-iteration",
        type=int,
        metavar="N",
        help="read diagnostics from this iteration on; by default the second half of them",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the advice."""
    try:
        snapshots = read_run(args.run_dir, args.from_iteration)
        advice = advise(snapshots, args.energy)
        if not advice.matrices:
            raise AdvisorError(f"{args.run_dir}: no matrix had any energy")
    except AdvisorError as error:
        raise ToolError(str(error)) from error
    print(describe(advice))
