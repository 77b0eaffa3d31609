import math
import random
from collections.abc import Sequence

import pytest

from megatron_dion_tools.convergence.checks import Verdict, band, below, exact
from megatron_dion_tools.convergence.curves import Curve, Curves
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.convergence.noise import estimate, seed_noise, smoothed, window_of

NEXT_TO_A_THIRD = math.nextafter(1 / 3, 1)


def curves(values: Sequence[float] | Curve, name: str = "run, seed 1", first: int = 1) -> Curves:
    """A run with one quantity, x."""
    curve = values if isinstance(values, dict) else dict(enumerate(values, start=first))
    return Curves(name, {"x": curve})


def repeats(
    ours: Sequence[float] | Curve, theirs: Sequence[float] | Curve, after: int | None = None
) -> Verdict:
    return exact(curves(ours), curves(theirs, "reference"), "x", after)


def test_the_same_numbers_repeat() -> None:
    verdict = repeats([3.0, 1 / 3], [3.0, 1 / 3])
    assert verdict.passed
    assert verdict.divergent is None
    assert verdict.finding == "the same numbers in 2 iterations"
    assert verdict.check == "run, seed 1 repeats reference"
    assert list(verdict.curves) == ["run, seed 1", "reference"]


def test_one_bit_is_a_difference() -> None:
    verdict = repeats([3.0, NEXT_TO_A_THIRD, 1.0], [3.0, 1 / 3, 2.0])
    assert not verdict.passed
    assert verdict.divergent == 2
    assert verdict.finding == f"first differs at iteration 2: {NEXT_TO_A_THIRD!r} against {1 / 3!r}"


@pytest.mark.parametrize(
    ("ours", "missing", "finding"),
    [
        ({1: 1.0, 2: 1.0}, 3, "run, seed 1 has no iteration 3 (its last is 2)"),
        ({1: 1.0, 3: 1.0, 4: 1.0}, 2, "run, seed 1 has no iteration 2 (its last is 4)"),
        ({}, 1, "run, seed 1 has no iteration 1 (it has none)"),
    ],
)
def test_an_iteration_that_is_missing_is_a_difference(
    ours: Curve, missing: int, finding: str
) -> None:
    theirs = [1.0, 1.0, 1.0, 1.0]
    reference = curves(theirs, "reference")
    for verdict in (
        repeats(ours, theirs),
        band(curves(ours), reference, [reference] * 3, 1.0, "x"),
    ):
        assert not verdict.passed
        assert verdict.divergent == missing
        assert verdict.finding == finding


def test_an_iteration_that_only_the_run_has_is_a_difference() -> None:
    verdict = repeats([1.0, 2.0, 3.0], [1.0, 2.0])
    assert verdict.divergent == 3
    assert verdict.finding == "first differs at iteration 3: 3.0 against nothing"


def test_a_run_that_continues_another_starts_later() -> None:
    assert repeats({3: 1.0, 4: 0.5}, [3.0, 2.0, 1.0, 0.5]).passed
    assert repeats({3: 1.0, 4: 0.5}, [3.0, 2.0, 1.0, 0.5], after=2).passed
    verdict = repeats({3: 1.0, 4: NEXT_TO_A_THIRD}, [3.0, 2.0, 1.0, 1 / 3], after=2)
    assert verdict.divergent == 4


@pytest.mark.parametrize(
    ("ours", "after", "divergent", "words"),
    [
        ({2: 2.0, 3: 1.0}, 0, 1, "has no iteration 1"),
        ({3: 1.0}, 1, 2, "has no iteration 2"),
        ({1: 3.0, 2: 2.0, 3: 1.0}, 1, 1, "starts with iteration 1 and not from its checkpoint"),
    ],
)
def test_a_run_starts_right_after_its_checkpoint(
    ours: Curve, after: int, divergent: int, words: str
) -> None:
    reference = curves([3.0, 2.0, 1.0], "reference")
    for verdict in (
        exact(curves(ours), reference, "x", after),
        band(curves(ours), reference, [reference] * 3, 1.0, "x", after),
    ):
        assert not verdict.passed
        assert verdict.divergent == divergent
        assert words in verdict.finding


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_right_even_in_both(value: float) -> None:
    verdict = repeats([1.0, value], [1.0, value])
    assert not verdict.passed
    assert verdict.divergent == 2


def test_smoothing_takes_the_last_points_and_fewer_at_the_beginning() -> None:
    curve = {10: 1.0, 20: 3.0, 30: 8.0, 40: 4.0}
    assert smoothed(curve, 1) == curve
    assert smoothed(curve, 3) == {10: 1.0, 20: 2.0, 30: 4.0, 40: 5.0}


@pytest.mark.parametrize(("points", "window"), [(1, 1), (14, 1), (16, 2), (200, 20)])
def test_the_window_is_a_tenth_of_a_curve(points: int, window: int) -> None:
    assert window_of(dict.fromkeys(range(points), 0.0)) == window


def test_seed_noise_by_hand() -> None:
    seeds = [{1: 1.0, 2: 1.0}, {1: 2.0, 2: 4.0}, {1: 3.0, 2: 7.0}]
    # Smoothed: 1, 1; 2, 3; 3, 5. Their variances are 1 and 4, averaged 1 and 2.5.
    assert seed_noise(seeds, 2) == {1: 1.0, 2: math.sqrt(2.5)}
    assert seed_noise(seeds, 1) == {1: 1.0, 2: 3.0}


def test_seed_noise_is_known_where_all_seeds_are() -> None:
    assert list(seed_noise([{1: 1.0, 2: 1.0}, {1: 2.0}, {1: 3.0, 2: 3.0}], 1)) == [1]


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_fewer_than_three_seeds_are_no_noise(seeds: int) -> None:
    with pytest.raises(ConvergenceError, match=f"three seeds or more, not {seeds}"):
        seed_noise([{1: 1.0}] * seeds, 1)
    with pytest.raises(ConvergenceError, match="three seeds or more"):
        band(curves([1.0]), curves([1.0]), [curves([1.0])] * seeds, 0.1, "x")


@pytest.mark.parametrize(
    ("values", "mean", "margin"),
    [
        ([1.0, 3.0], 2.0, 12.706),
        ([1.0, 2.0, 3.0], 2.0, 4.303 / math.sqrt(3)),
        ([1.0] * 5 + [3.0] * 5, 2.0, 2.262 / 3),
        ([1.0] * 8 + [3.0] * 8, 2.0, 2.131 / math.sqrt(15)),
        ([1.0] * 50 + [3.0] * 50, 2.0, 1.984 / math.sqrt(99)),
    ],
)
def test_estimates_have_students_intervals(values: list[float], mean: float, margin: float) -> None:
    found = estimate(values)
    assert found.mean == mean
    assert found.margin == pytest.approx(margin, rel=5e-4)
    assert found.seeds == len(values)


@pytest.mark.parametrize(
    ("seeds", "quantile"), [(10, 2.2622), (11, 2.2281), (12, 2.2010), (21, 2.0860), (31, 2.0423)]
)
def test_margins_shrink_steadily_with_seeds(seeds: int, quantile: float) -> None:
    values = [float(i) for i in range(seeds)]
    deviation = math.sqrt(seeds * (seeds + 1) / 12)
    margin = quantile * deviation / math.sqrt(seeds)
    assert estimate(values).margin == pytest.approx(margin, rel=2e-3)


def test_one_value_is_an_estimate_without_a_limit() -> None:
    assert estimate([2.5]).margin == math.inf


def constant_noise(points: int) -> list[Curves]:
    """Three seeds with a standard deviation of 1 everywhere."""
    return [curves([value] * points, f"seed {value}") for value in (4.0, 5.0, 6.0)]


def follows(ours: Sequence[float] | Curve, points: int = 4, share: float = 0.5) -> Verdict:
    seeds = constant_noise(points)
    return band(curves(ours), curves([5.0] * points, "reference"), seeds, share, "x")


@pytest.mark.parametrize(("offset", "passed"), [(0.5, True), (-0.5, True), (0.51, False)])
def test_the_band_ends_at_its_share_of_the_noise(offset: float, passed: bool) -> None:
    verdict = follows([5.0, 5.0, 5.0 + offset, 5.0])
    assert verdict.passed == passed
    assert verdict.divergent == (None if passed else 3)
    assert verdict.band == dict.fromkeys((1, 2, 3, 4), 0.5)
    assert f"at most {abs(offset):.3g} of the seed noise away (iteration 3)" in verdict.finding


def test_leaving_the_band_is_told_in_numbers() -> None:
    verdict = follows([5.0, 5.0, 4.25, 4.0])
    assert verdict.check == "run, seed 1 follows reference within 0.5 of the seed noise"
    assert verdict.finding == (
        "leaves the band at iteration 3: 4.25 against 5.0 (mean of 1 iterations off by -0.75, "
        "allowed are 0.5); at most 1 of the seed noise away (iteration 4); allowed are 0.5"
    )


def test_the_band_averages_single_iterations_away() -> None:
    steady, jumping = [5.0] * 40, [5.0] * 40
    jumping[20], jumping[21] = 6.0, 4.0
    assert follows(jumping, points=40).passed
    assert not follows([*steady[:20], 6.0, 6.0, 6.0, *steady[23:]], points=40).passed


def test_the_first_iterations_of_a_band_are_averaged_over_those_there_are() -> None:
    assert follows([5.75, *[5.0] * 39], points=40).divergent == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_the_band(value: float) -> None:
    assert follows([5.0, 5.0, value, 5.0]).divergent == 3


def test_a_band_without_noise_allows_nothing() -> None:
    reference = curves([1.0, 2.0], "reference")
    assert band(curves([1.0, 2.0]), reference, [reference] * 3, 0.5, "x").passed
    assert band(curves([1.0, 2.1]), reference, [reference] * 3, 0.5, "x").divergent == 2


def test_a_run_that_continues_another_is_in_the_band_from_there_on() -> None:
    assert follows({3: 5.0, 4: 5.0}).passed
    assert follows({3: 5.0, 4: 6.0}).divergent == 4


@pytest.mark.parametrize(("reference", "seeds"), [(2, 4), (4, 2)])
def test_iterations_without_reference_or_noise_are_outside_the_band(
    reference: int, seeds: int
) -> None:
    verdict = band(curves([5.0] * 4), curves([5.0] * reference), constant_noise(seeds), 0.5, "x")
    assert verdict.divergent == 3
    assert verdict.finding.startswith("nothing to compare iteration 3 with")


def test_a_run_beyond_all_that_is_known_is_outside_the_band() -> None:
    assert follows({5: 5.0, 6: 5.0}).divergent == 5


def noisy(seed: int, points: int = 200) -> list[float]:
    """A falling curve with noise of batches, and a little of its own that stays."""
    chance = random.Random(seed)
    shift = chance.gauss(0, 0.05)
    return [8 / (1 + i / 20) + shift + chance.gauss(0, 0.2) for i in range(points)]


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_bands_tell_rounding_from_a_shift_that_seeds_would_hide(seeds: int) -> None:
    chance = random.Random(1234)
    for trial in range(20):
        drawn = [noisy(100 * trial + seed) for seed in range(seeds)]
        known = [curves(values) for values in drawn]
        rounded = [value * (1 + chance.gauss(0, 1e-6)) for value in drawn[0]]
        assert band(curves(rounded), known[0], known, 0.1, "x").passed
        sigma = max(seed_noise([one.curve("x") for one in known], 20).values())
        shifted = curves([value + 0.3 * sigma for value in drawn[0]])
        assert not band(shifted, known[0], known, 0.1, "x").passed


def lies_below(ours: list[list[float]], theirs: list[list[float]], at: int) -> Verdict:
    return below(
        [curves(values, f"Dion, seed {seed}") for seed, values in enumerate(ours)],
        [curves(values, f"AdamW, seed {seed}") for seed, values in enumerate(theirs)],
        at,
        "x",
    )


def test_clearly_below() -> None:
    # The gaps are -1.1, -1.2 and -1.3: a standard deviation of 0.1, times 4.303 / sqrt(3).
    verdict = lies_below([[9.0, 1.9], [9.0, 2.8], [9.0, 3.7]], [[1.0, 3], [1.0, 4], [1.0, 5]], at=2)
    assert verdict.passed
    assert verdict.divergent is None
    assert verdict.finding == "-1.2000 ± 0.2484 over 3 seeds"
    assert verdict.check == "Dion is below AdamW at iteration 2"
    assert list(verdict.curves)[:2] == ["Dion, seed 0", "AdamW, seed 0"]


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        ([4.0, 3.0, 2.0], "-2.0000 ± 2.4843 over 3 seeds"),
        ([6.0, 6.0, 6.0], "+1.0000 ± 0.0000 over 3 seeds"),
        ([5.0, 5.0, 5.0], "+0.0000 ± 0.0000 over 3 seeds"),
        ([math.nan, 1.0, 1.0], "+nan ± nan over 3 seeds"),
        ([1.0, math.inf, 1.0], "+inf ± inf over 3 seeds"),
    ],
)
def test_not_below_beyond_doubt(ours: list[float], why: str) -> None:
    verdict = lies_below([[value] for value in ours], [[5.0]] * 3, at=1)
    assert not verdict.passed
    assert verdict.divergent == 1
    assert verdict.finding == why


def test_one_pair_of_seeds_is_never_beyond_doubt() -> None:
    assert not lies_below([[1.0]], [[100.0]], at=1).passed


def test_below_averages_the_window_before_its_iteration() -> None:
    ours = [[0.0] * 18 + [2.0, 6.0, 0.0]] * 3
    theirs = [[0.0] * 18 + [5.0, 4.0, 0.0]] * 3
    assert lies_below(ours, theirs, at=20).finding.startswith("-0.5000 ±")


def test_below_needs_its_iteration_in_every_run() -> None:
    verdict = lies_below([[1.0, 1.0], [1.0]], [[2.0, 2.0], [2.0, 2.0]], at=2)
    assert not verdict.passed
    assert verdict.finding == "a run does not reach iteration 2"


def test_a_check_of_a_curve_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConvergenceError, match="run, seed 1 has no curve of lm_loss"):
        exact(curves([1.0]), curves([1.0]), "lm_loss")
