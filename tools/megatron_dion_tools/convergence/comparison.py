"""Compares runs that anybody has at hand, without a case: which need not be logged alike."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_dion_tools.convergence import checks
from megatron_dion_tools.convergence.checks import Verdict
from megatron_dion_tools.convergence.curves import QUANTITIES, Curve, Curves
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.convergence.noise import smoothed, window_of


def compare(
    runs: Sequence[Curves], noise: Sequence[Curves], share: float, quantities: Sequence[str]
) -> list[Verdict]:
    """Hold runs against the first of them, in the iterations that all curves have.

    A run that ends before the reference does is not as it should be.

    Args:
        runs: two or more, with different names; the first is the reference.
        noise: three runs or more that differ in nothing but their seed; with them, runs are as they
            should be within a share of the noise of seeds, without them if they are equal.
        share: of the seed noise, that the difference of two smoothed curves may have.
        quantities: to compare; by default those of `QUANTITIES` that the runs have.

    Raises:
        ConvergenceError: there is nothing to compare; says what is missing, and what there is.
    """
    if len(runs) < 2:
        raise ConvergenceError(f"comparing needs two runs or more, not {len(runs)}")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConvergenceError(f"runs must have different names, not {', '.join(names)}")
    reference, *others = runs
    return [
        _compare(run, reference, noise, share, quantity)
        for run in others
        for quantity in quantities or _common_quantities([run, reference, *noise])
    ]


def _common_quantities(all_curves: Sequence[Curves]) -> list[str]:
    common = [name for name in QUANTITIES if all(name in one.quantities for one in all_curves)]
    if not common:
        has = "; ".join(
            f"{one.name} has {', '.join(one.quantities) or 'nothing'}" for one in all_curves
        )
        raise ConvergenceError(f"none of {', '.join(QUANTITIES)} is in all runs: {has}")
    return common


def _compare(
    run: Curves, reference: Curves, noise: Sequence[Curves], share: float, quantity: str
) -> Verdict:
    given = [run, reference, *noise]
    alike = _in_one_precision(given)
    common = _common_iterations(alike, quantity)
    ours, theirs, *seeds = (_only(one, quantity, common) for one in alike)
    if noise:
        verdict = checks.band(ours, theirs, seeds, share, quantity)
        finding = verdict.finding
    else:
        verdict = checks.exact(ours, theirs, quantity)
        finding = f"{verdict.finding}; {_size(ours.curve(quantity), theirs.curve(quantity))}"
    missed = next((i for i in reference.curve(quantity) if i > max(run.curve(quantity))), None)
    early = None if missed is None else f"ends at iteration {max(run.curve(quantity))}, too early"
    notes = [_iterations(given, quantity), _precision(given), _lacks(run, reference)]
    return replace(
        verdict,
        passed=verdict.passed and missed is None,
        divergent=missed if verdict.divergent is None else verdict.divergent,
        finding="; ".join(filter(None, [early, finding, *notes])),
        window=window_of(theirs.curve(quantity)),
    )


def _in_one_precision(all_curves: Sequence[Curves]) -> list[Curves]:
    """What TensorBoard rounded can only be equal to what is rounded as well."""
    if any(one.single_precision for one in all_curves):
        return [one.rounded() for one in all_curves]
    return list(all_curves)


def _common_iterations(all_curves: Sequence[Curves], quantity: str) -> set[int]:
    common = set.intersection(*(set(one.curve(quantity)) for one in all_curves))
    if not common:
        raise ConvergenceError(
            f"no iteration of {quantity} is in all runs: {_extents(all_curves, quantity)}"
        )
    return common


def _only(curves: Curves, quantity: str, iterations: set[int]) -> Curves:
    curve = curves.curve(quantity)
    return replace(curves, quantities={quantity: {i: curve[i] for i in curve if i in iterations}})


def _size(ours: Curve, theirs: Curve) -> str:
    """How far two curves are from each other, which equality does not say."""
    window = window_of(theirs)
    differences = smoothed({i: ours[i] - theirs[i] for i in ours}, window)
    *_, last = differences
    largest = max(differences, key=lambda iteration: abs(differences[iteration]))
    return (
        f"difference of means over {window}: {differences[last]:+.3g} in the end, "
        f"at most {differences[largest]:+.3g} (iteration {largest})"
    )


def _iterations(all_curves: Sequence[Curves], quantity: str) -> str | None:
    """Says which iterations were compared, where not all runs have the same."""
    if len({tuple(one.curve(quantity)) for one in all_curves}) == 1:
        return None
    common = _common_iterations(all_curves, quantity)
    return f"compared in {len(common)} common iterations: {_extents(all_curves, quantity)}"


def _extents(all_curves: Sequence[Curves], quantity: str) -> str:
    return ", ".join(_extent(one.name, one.curve(quantity)) for one in all_curves)


def _extent(name: str, curve: Curve) -> str:
    if not curve:
        return f"{name} has none"
    return f"{name} has {len(curve)} from {min(curve)} to {max(curve)}"


def _lacks(run: Curves, reference: Curves) -> str | None:
    lacking = [q for q in QUANTITIES if q in reference.quantities and q not in run.quantities]
    return f"it has no {', '.join(lacking)}" if lacking else None


def _precision(all_curves: Sequence[Curves]) -> str | None:
    if len({one.single_precision for one in all_curves}) == 1:
        return None
    return "all rounded to float32, as TensorBoard keeps numbers"
