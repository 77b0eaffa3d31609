"""The checks: each looks at curves and says whether they are what they should be, and where not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_dion_tools.convergence.curves import Curve, Curves
from megatron_dion_tools.convergence.noise import estimate, seed_noise, smoothed, window_of

SHARE = 0.1
"""Of the seed noise, that a change which ought to change nothing may move a curve. To tell a shift
of a tenth of a standard deviation from chance takes some eight hundred seeds on either side: nobody
who trains would see it."""


@dataclass(frozen=True)
class Verdict:
    """What a check found for one quantity.

    Attributes:
        check: what was checked, in words.
        quantity: of which curve.
        passed: whether it is as it should be.
        finding: one sentence, with numbers.
        divergent: the first iteration at which it was not, if there is one.
        curves: for the picture, by name; after each run follows what it is held against.
        band: how far a smoothed curve may be from what it is held against, by iteration; if any.
        window: number of points over which curves were averaged.
    """

    check: str
    quantity: str
    passed: bool
    finding: str
    divergent: int | None
    curves: Mapping[str, Curve]
    band: Curve | None = None
    window: int = 1


def exact(run: Curves, reference: Curves, quantity: str, after: int | None = None) -> Verdict:
    """Whether a run has the very numbers of another.

    Numbers that are not finite are never right.

    Args:
        run: the run in question.
        reference: what it should repeat.
        quantity: name of the curves.
        after: the iteration with which the run starts, so that it has exactly the later ones;
            None takes its own first one.

    Raises:
        ConvergenceError: no such curves.
    """
    ours, theirs = run.curve(quantity), reference.curve(quantity)
    divergent = _first_missing(ours, theirs, after)
    if divergent is not None:
        finding = _missing(run, divergent, ours)
    else:
        wrong = (i for i in ours if ours[i] != theirs.get(i) or not math.isfinite(ours[i]))
        divergent = next(wrong, None)
        finding = f"the same numbers in {len(ours)} iterations"
        if divergent is not None:
            finding = f"first differs {_against(divergent, ours, theirs)}"
    return Verdict(
        check=f"{run.name} repeats {reference.name}",
        quantity=quantity,
        passed=divergent is None,
        finding=finding,
        divergent=divergent,
        curves={run.name: ours, reference.name: theirs},
    )


def band(
    run: Curves,
    reference: Curves,
    seeds: Sequence[Curves],
    share: float,
    quantity: str,
    after: int | None = None,
) -> Verdict:
    """Whether a run stays as close to another of the same seed as the noise of seeds allows.

    Smoothed, their difference must be at most `share` times the standard deviation that smoothed
    curves have over seeds.

    Args:
        run: the run in question.
        reference: with the same seed, so that the noise of batches cancels.
        seeds: runs like the reference, one for each seed.
        share: of the standard deviation.
        quantity: name of the curves.
        after: as for `exact`.

    Raises:
        ConvergenceError: there are fewer than three seeds, or no such curves.
    """
    ours, theirs = run.curve(quantity), reference.curve(quantity)
    window = window_of(theirs)
    noise = seed_noise([one.curve(quantity) for one in seeds], window)
    limits = {iteration: share * value for iteration, value in noise.items()}
    divergent = _first_missing(ours, theirs, after)
    if divergent is not None:
        finding = _missing(run, divergent, ours)
    else:
        compared = [i for i in ours if i in theirs and i in limits]
        distance = smoothed({i: ours[i] - theirs[i] for i in compared}, window)
        # `not <=` is also true of NaN.
        outside = (i for i in ours if i not in distance or not abs(distance[i]) <= limits[i])
        divergent = next(outside, None)
        finding = _widest(distance, noise, share)
        if divergent is not None and divergent not in distance:
            finding = f"nothing to compare iteration {divergent} with; {finding}"
        elif divergent is not None:
            finding = (
                f"leaves the band {_against(divergent, ours, theirs)} (mean of {window} "
                f"iterations off by {distance[divergent]:+.3g}, allowed are "
                f"{limits[divergent]:.3g}); {finding}"
            )
    return Verdict(
        check=f"{run.name} follows {reference.name} within {share:g} of the seed noise",
        quantity=quantity,
        passed=divergent is None,
        finding=finding,
        divergent=divergent,
        curves={run.name: ours, reference.name: theirs},
        band=limits,
        window=window,
    )


def below(runs: Sequence[Curves], others: Sequence[Curves], at: int, quantity: str) -> Verdict:
    """Whether runs lie below others at an iteration, beyond doubt: 95 % over pairs of seeds.

    Args:
        runs: one for each seed.
        others: of the same seeds, in the same order.
        at: the iteration; curves are averaged over the window that ends with it.
        quantity: name of the curves.

    Raises:
        ConvergenceError: no such curves.
    """
    pairs = [
        (run.curve(quantity), other.curve(quantity))
        for run, other in zip(runs, others, strict=True)
    ]
    window = window_of(pairs[0][0])
    name, other = without_seed(runs[0].name), without_seed(others[0].name)
    curves: dict[str, Curve] = {}
    for run, reference, (ours, theirs) in zip(runs, others, pairs, strict=True):
        curves |= {run.name: ours, reference.name: theirs}
    if any(at not in curve for pair in pairs for curve in pair):
        passed, finding = False, f"a run does not reach iteration {at}"
    else:
        gaps = [smoothed(ours, window)[at] - smoothed(theirs, window)[at] for ours, theirs in pairs]
        found = estimate(gaps)
        passed = found.mean + found.margin < 0
        finding = f"{found.mean:+.4f} ± {found.margin:.4f} over {found.seeds} seeds"
    return Verdict(
        check=f"{name} is below {other} at iteration {at}",
        quantity=quantity,
        passed=passed,
        finding=finding,
        divergent=None if passed else at,
        curves=curves,
        window=window,
    )


def _first_missing(ours: Curve, theirs: Curve, after: int | None) -> int | None:
    """The first iteration that a run has too early, or that it should have and has not."""
    if not ours:
        return next(iter(theirs), 0)
    first = min(ours)
    if after is not None and first <= after:
        return first
    start = first if after is None else after + 1
    return next((i for i in theirs if i >= start and i not in ours), None)


def _missing(run: Curves, iteration: int, ours: Curve) -> str:
    if iteration in ours:
        return f"{run.name} starts with iteration {iteration} and not from its checkpoint"
    last = f"its last is {max(ours)}" if ours else "it has none"
    return f"{run.name} has no iteration {iteration} ({last})"


def _against(iteration: int, ours: Curve, theirs: Curve) -> str:
    other = repr(theirs[iteration]) if iteration in theirs else "nothing"
    return f"at iteration {iteration}: {ours[iteration]!r} against {other}"


def _widest(distance: Curve, noise: Curve, share: float) -> str:
    finite = {i: abs(value) for i, value in distance.items() if math.isfinite(value)}
    compared = {i: value / noise[i] for i, value in finite.items() if noise[i]}
    if not compared:
        return "nothing to compare"
    where = max(compared, key=compared.__getitem__)
    return (
        f"at most {compared[where]:.3g} of the seed noise away (iteration {where}); "
        f"allowed are {share:g}"
    )


def without_seed(name: str) -> str:
    """The name of a run, whatever its seed."""
    return name.partition(", seed")[0]
