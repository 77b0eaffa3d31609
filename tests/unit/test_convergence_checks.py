"""Curves, the noise of seeds, and what a check says of two curves."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_dion_tools.convergence.checks import Verdict, compare, follows
from megatron_dion_tools.convergence.curves import (
    Curve,
    Curves,
    read_curves,
    seed_noise,
    smoothed,
    window_of,
)
from megatron_dion_tools.errors import ToolError

STEPS = 40
NEXT_TO_A_THIRD = math.nextafter(1 / 3, 1)


def curves(values: Sequence[float] | Mapping[int, float], name: str = "run") -> Curves:
    """A run with one quantity, x."""
    curve = values if isinstance(values, Mapping) else dict(enumerate(values, start=1))
    return Curves(name, {"x": dict(curve)})


def repeats(ours: Mapping[int, float], theirs: Sequence[float], after: int = 0) -> Verdict:
    return follows(curves(ours), curves(theirs, "reference"), "x", 0.0, after=after)


@pytest.mark.parametrize(
    ("ours", "after", "divergent"),
    [
        ({1: 3.0, 2: 1 / 3, 3: 2.0}, 0, None),
        ({1: 3.0, 2: NEXT_TO_A_THIRD, 3: 1.0}, 0, 2),  # one bit
        ({1: 3.0, 2: 1 / 3}, 0, 3),  # ends too early
        ({2: 1 / 3, 3: 2.0}, 0, 1),  # starts too late
        ({1: 3.0, 3: 2.0}, 0, 2),  # has a gap
        ({1: 3.0, 2: 1 / 3, 3: 2.0, 4: 1.0}, 0, 4),  # goes on too long
        ({2: 1 / 3, 3: 2.0}, 1, None),  # continues a checkpoint of iteration 1
        ({3: 2.0}, 1, 2),  # continues it too late
        ({1: 3.0, 2: 1 / 3, 3: 2.0}, 1, 1),  # did not continue it but started again
    ],
)
def test_equality_is_of_all_bits_and_iterations(
    ours: Curve, after: int, divergent: int | None
) -> None:
    verdict = repeats(ours, [3.0, 1 / 3, 2.0], after)
    assert verdict.divergent == divergent
    assert verdict.is_good == (divergent is None)
    if divergent is not None:
        assert f"iteration {divergent}" in str(verdict)
        assert str(verdict).startswith("FAILED  run follows reference bit for bit: x: ")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_what_is_not_finite_fails_even_in_both(value: float, share: float) -> None:
    bad = [1.0, value, 1.0]
    seeds = [curves([1.0, 2.0, 3.0]), curves([2.0, 2.0, 1.0]), curves([0.0, 1.0, 2.0])]
    verdict = follows(curves(bad), curves(bad, "reference"), "x", share, seeds)
    assert verdict.divergent == 2


def test_smoothing_and_noise_by_hand() -> None:
    curve = {10: 1.0, 20: 3.0, 30: 8.0, 40: 4.0}
    assert smoothed(curve, 1) == curve
    assert smoothed(curve, 3) == {10: 1.0, 20: 2.0, 30: 4.0, 40: 5.0}
    assert [window_of(dict.fromkeys(range(n), 0.0)) for n in (1, 14, 16, 200)] == [1, 1, 2, 20]
    seeds = [{1: 1.0, 2: 1.0}, {1: 2.0, 2: 4.0}, {1: 3.0, 2: 7.0}]
    # Smoothed: 1, 1; 2, 3; 3, 5. Their variances are 1 and 4, averaged 1 and 2.5.
    assert seed_noise(seeds, 2) == {1: 1.0, 2: math.sqrt(2.5)}
    with pytest.raises(ToolError, match="three seeds or more, not 2"):
        seed_noise(seeds[:2], 2)


def seeds_of(generator: np.random.Generator) -> list[Curves]:
    return [curves(list(generator.normal(0.0, 1.0, STEPS))) for _ in range(5)]


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_band_is_as_wide_as_its_share_of_the_noise(share: float, sign: int) -> None:
    """A shift that is just inside passes; just outside, it fails where the noise is least."""
    seeds = seeds_of(np.random.default_rng(0))
    reference = seeds[0].curve("x")
    noise = seed_noise([one.curve("x") for one in seeds], window_of(reference))
    least = min(noise, key=noise.__getitem__)
    for size, divergent in ((0.999, None), (1.001, least)):
        shift = sign * size * share * noise[least]
        ours = curves({i: value + shift for i, value in reference.items()})
        verdict = follows(ours, curves(reference, "reference"), "x", share, seeds)
        assert verdict.divergent == divergent
        assert f"at most {size * share:.3g} of the seed noise" in verdict.finding


def test_a_planted_mistake_must_be_noticed() -> None:
    verdicts = repeats({1: 1.0}, [1.0]), repeats({1: 2.0}, [1.0])
    assert [verdict.is_good for verdict in verdicts] == [True, False]
    controls = [str(replace(verdict, notices=True)) for verdict in verdicts]
    assert [line.partition("  ")[0] for line in controls] == ["NOT NOTICED", "noticed"]


# Reading and comparing


def test_curves_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    """Later values count, iterations are in order, and what is not a number is no curve."""
    lines = [
        {"kind": "train", "iteration": 2, "lm_loss": 2.0, "lr": 1},
        {"kind": "train", "iteration": 1, "lm_loss": None, "skipped": True},
        {"kind": "validation", "iteration": 2, "lm_loss": 5.0},
        {"kind": "train", "iteration": 2, "lm_loss": 3.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"unfinished')
    for place in (path, tmp_path):
        read = read_curves(place, "run")
        assert read.quantities == {"lm_loss": {2: 3.0}, "lr": {2: 1.0}, "validation_loss": {2: 5.0}}
    with pytest.raises(ToolError, match=r"run has no curve of x \(it has lm_loss, lr, valid"):
        read.curve("x")


@pytest.mark.parametrize("text", ["[1]\n", "not json\n", '{"kind": "train", "a": 1}\n'])
def test_what_is_no_metrics_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ToolError, match="not lines of metrics"):
        read_curves(tmp_path / "file", "run")
    with pytest.raises(ToolError, match=r"neither a metrics\.jsonl, nor a folder with one"):
        read_curves(tmp_path, "run")


def test_only_common_iterations_are_compared_but_an_early_end_fails() -> None:
    reference = curves({2: 1.0, 4: 2.0, 6: 3.0}, "reference")
    [longer] = compare([reference, curves([9.0, 1.0, 9.0, 2.0, 9.0, 3.0, 9.0])], [], 0.1, ["x"])
    assert longer.is_good
    assert longer.finding.startswith("3 iterations, ")
    [shorter] = compare([reference, curves([9.0, 1.0, 9.0, 2.0])], [], 0.1, ["x"])
    assert shorter.divergent == 6
    assert shorter.finding.startswith("differs at iteration 6: nothing against 3.0")


@pytest.mark.parametrize(
    ("runs", "quantities", "complaint"),
    [
        ([curves([1.0])], [], "two different runs or more, not run"),
        ([curves([1.0]), curves([1.0])], [], "two different runs or more, not run, run"),
        ([curves([1.0]), curves([1.0], "b")], [], "none of lm_loss, .* is in all of the runs"),
        ([curves([1.0]), curves([1.0], "b")], ["y"], r"b has no curve of y \(it has x\)"),
        (
            [curves({1: 1.0}), curves({2: 1.0}, "b")],
            ["x"],
            "b and run have no iteration of x in common",
        ),
    ],
)
def test_nothing_to_compare(runs: list[Curves], quantities: list[str], complaint: str) -> None:
    with pytest.raises(ToolError, match=complaint):
        compare(runs, [], 0.1, quantities)
