"""Compares curves: is one within a share of the seed noise around the other?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dion_tools.convergence.curves import (
    QUANTITIES,
    Curve,
    Curves,
    seed_noise,
    smoothed,
    window_of,
)
from megatron_dion_tools.errors import ToolError

SHARE = 0.1
"""The share of the seed noise by which a change that should change nothing may move a curve. Nobody
would see such a shift: to tell it from chance takes about eight hundred seeds on either side."""


@dataclass(frozen=True)
class Verdict:
    """What a check says of one quantity.

    Attributes:
        run: Name of the run.
        reference: Name of the run with which it was compared.
        quantity: Name of the curves.
        share: The allowed share of the seed noise; 0 for equality.
        finding: One sentence with numbers.
        divergent: The first iteration at which something is wrong; None if nothing is.
        curves: Those of the run and of the reference.
        notices: Whether the run has a planted mistake, which the check must notice.
    """

    run: str
    reference: str
    quantity: str
    share: float
    finding: str
    divergent: int | None
    curves: tuple[Curve, Curve]
    notices: bool = False

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong, or a planted mistake was noticed."""
        return (self.divergent is None) != self.notices

    def __str__(self) -> str:
        words = ("noticed", "NOT NOTICED") if self.notices else ("passed", "FAILED")
        how = f"within {self.share:g} of the seed noise" if self.share else "bit for bit"
        return (
            f"{words[not self.is_good]}  {self.run} follows {self.reference} {how}: "
            f"{self.quantity}: {self.finding}"
        )


def follows(
    run: Curves,
    reference: Curves,
    quantity: str,
    share: float,
    seeds: Sequence[Curves] = (),
    after: int = 0,
) -> Verdict:
    """Check that a run stays as close to a reference with the same seed as seed noise allows.

    Both curves are averaged over a window. At each iteration their difference must be at most
    `share` times the standard deviation that such averages have over seeds. With a share of 0,
    both must have the same numbers, bit for bit. Numbers that are not finite fail, and
    iterations that only one of the curves has.

    Args:
        run: The run in question.
        reference: A run with the same seed, so that the noise of batches cancels.
        quantity: Name of the curves.
        share: Of the seed noise.
        seeds: Runs like the reference, one for each seed; three or more where `share` is not 0.
        after: Iteration of the checkpoint from which the run starts; it must have later ones only.

    Raises:
        ToolError: There are too few seeds, or a run has no such curve.
    """
    ours, theirs = run.curve(quantity), reference.curve(quantity)
    common = [i for i in ours if i in theirs and i > after]
    window = window_of(theirs) if share else 1
    noise = seed_noise([one.curve(quantity) for one in seeds], window) if share else {}
    allowed = {i: share * value for i, value in noise.items()}
    distance = smoothed({i: ours[i] - theirs[i] for i in common}, window)
    needed = {*ours, *(i for i in theirs if i > after)}
    # `not <=` is also true of NaN.
    wrong = (i for i in needed if not abs(distance.get(i, math.nan)) <= allowed.get(i, 0.0))
    divergent = min(wrong, default=None)
    last = next(reversed(distance.values()), math.nan)
    findings = [f"{len(common)} iterations, the last differ by {last:+.3g}"]
    if share:
        shares = {abs(d) / noise[i]: i for i, d in distance.items() if noise.get(i)}
        most = max(filter(math.isfinite, shares), default=math.nan)
        findings.append(f"at most {most:.3g} of the seed noise (iteration {shares.get(most)})")
    if divergent is not None:
        values = " against ".join(str(curve.get(divergent, "nothing")) for curve in (ours, theirs))
        early = " (which is before its checkpoint)" if divergent <= after else ""
        findings.insert(0, f"differs at iteration {divergent}{early}: {values}")
    finding, curves = "; ".join(findings), (ours, theirs)
    return Verdict(run.name, reference.name, quantity, share, finding, divergent, curves)


def compare(
    runs: Sequence[Curves], noise: Sequence[Curves], share: float, quantities: Sequence[str]
) -> list[Verdict]:
    """Compare runs with the first of them, in the iterations that all curves have.

    Runs need not be logged alike, but one that ends before the reference fails.

    Args:
        runs: Two runs or more with different names; the first is the reference.
        noise: Three runs or more that differ in their seed only. With them, runs must stay within
            a share of the seed noise; without them, runs must be equal.
        share: Of the seed noise.
        quantities: Names of curves; none for those of `QUANTITIES` that all runs have.

    Raises:
        ToolError: There is nothing to compare; the message says what is missing.
    """
    names = [run.name for run in runs]
    if len(set(names)) < max(2, len(names)):
        raise ToolError(f"compare needs two different runs or more, not {', '.join(names)}")
    common = [q for q in QUANTITIES if all(q in one.quantities for one in (*runs, *noise))]
    if not (quantities or common):
        raise ToolError(f"none of {', '.join(QUANTITIES)} is in all of the runs")
    verdicts = []
    for run in runs[1:]:
        for quantity in quantities or common:
            given = (run, runs[0], *noise)
            shared = set.intersection(*(set(one.curve(quantity)) for one in given))
            if not shared:
                all_names = " and ".join(one.name for one in given)
                raise ToolError(f"{all_names} have no iteration of {quantity} in common")
            end = max(run.curve(quantity))
            curves = [
                {i: x for i, x in one.curve(quantity).items() if i in shared or i > end}
                for one in given
            ]
            ours, theirs, *seeds = (
                Curves(one.name, {quantity: curve})
                for one, curve in zip(given, curves, strict=True)
            )
            verdicts.append(follows(ours, theirs, quantity, share if noise else 0.0, seeds))
    return verdicts
