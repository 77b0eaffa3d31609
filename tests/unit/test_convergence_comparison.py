import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_dion_tools.convergence.comparison import compare
from megatron_dion_tools.convergence.curves import Curve, Curves, read_curves
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.convergence.pictures import draw_comparison, png

TAGS = {
    "lm_loss": "lm loss",
    "grad_norm": "grad-norm",
    "lr": "learning-rate",
    "validation_loss": "lm loss validation",
}
SAMPLES_PER_ITERATION = 16


def loss(iteration: int) -> float:
    return 2 + 8 / iteration


def run(name: str, of: Callable[[int], float] = loss, last: int = 100, every: int = 1) -> Curves:
    curve = {i: of(i) for i in range(every, last + 1, every)}
    rate = {i: 1e-3 * (1 - i / 1000) for i in curve}
    validation = {i: of(i) + 0.1 for i in curve if i % 50 == 0}
    quantities = {"grad_norm": curve, "lm_loss": curve, "lr": rate, "validation_loss": validation}
    return Curves(name, quantities)


def shifted(by: float) -> Callable[[int], float]:
    return lambda iteration: loss(iteration) + by


def seeds() -> list[Curves]:
    """Three runs whose standard deviation is 0.01 everywhere."""
    return [run(f"seed {number}", shifted(0.01 * number)) for number in (-1, 0, 1)]


def write_metrics(path: Path, curves: Curves) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"lm_loss", "grad_norm", "lr"}
    lines = [
        {"kind": "train", "iteration": i, "tokens": 100 * i, "train_seconds": 0.5}
        | {name: curves.quantities[name][i] for name in names}
        for i in curves.quantities["lm_loss"]
    ]
    lines += [
        {"kind": "validation", "iteration": i, "lm_loss": value}
        for i, value in curves.quantities["validation_loss"].items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_events(folder: Path, quantities: Mapping[str, Curve]) -> Path:
    """As Megatron does: every curve by iteration and once more by samples."""
    writer = EventFileWriter(str(folder))
    for name, curve in quantities.items():
        for i, value in curve.items():
            for tag, step in (
                (TAGS[name], i),
                (f"{TAGS[name]} vs samples", SAMPLES_PER_ITERATION * i),
            ):
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                writer.add_event(Event(wall_time=float(i), step=step, summary=summary))
    writer.close()
    return folder


def test_equal_runs(tmp_path: Path) -> None:
    by_file = read_curves(write_metrics(tmp_path / "one" / "metrics.jsonl", run("")))
    write_metrics(tmp_path / "two" / "metrics.jsonl", run(""))
    verdicts = compare([read_curves(tmp_path / "two"), by_file], [], 0.1, [])
    assert [v.quantity for v in verdicts] == ["lm_loss", "grad_norm", "validation_loss", "lr"]
    assert all(v.passed for v in verdicts)
    assert verdicts[0].finding == (
        "the same numbers in 100 iterations; "
        "difference of means over 10: +0 in the end, at most +0 (iteration 1)"
    )
    assert verdicts[0].check == f"{by_file.name} repeats {tmp_path / 'two'}"


def test_without_noise_one_bit_is_a_difference() -> None:
    other = run("b", lambda i: loss(i) if i < 40 else math.nextafter(loss(i), 9))
    [verdict] = compare([run("a"), other], [], 0.1, ["lm_loss"])
    assert (verdict.passed, verdict.divergent) == (False, 40)


def test_says_how_far_runs_are_apart() -> None:
    other = run("b", lambda i: loss(i) + (0.5 if i in range(20, 30) else 0.25 if i > 90 else 0))
    [verdict] = compare([run("a"), other], [], 0.1, ["lm_loss"])
    assert "means over 10: +0.25 in the end, at most +0.5 (iteration 29)" in verdict.finding
    assert verdict.window == 10
    lower = run("c", shifted(-0.75))
    [verdict] = compare([run("a"), lower], [], 0.1, ["lm_loss"])
    assert "-0.75 in the end, at most -0.75 (iteration " in verdict.finding


def test_every_run_is_held_against_the_first() -> None:
    verdicts = compare([run("a"), run("b"), run("c")], [], 0.1, ["lm_loss", "lr"])
    assert [(v.check, v.quantity) for v in verdicts] == [
        (f"{name} repeats a", quantity) for name in "bc" for quantity in ("lm_loss", "lr")
    ]


def test_with_noise_a_share_of_it_is_allowed() -> None:
    near = run("near", shifted(0.0009))
    far = run("far", shifted(0.0011))
    for_near, for_far = compare([run("a"), near, far], seeds(), 0.1, ["lm_loss"])
    assert (for_near.passed, for_far.passed) == (True, False)
    assert for_far.check == "far follows a within 0.1 of the seed noise"
    assert for_far.divergent == 1
    [verdict] = compare([run("a"), far], seeds(), 0.2, ["lm_loss"])
    assert verdict.passed


def test_noise_needs_three_seeds() -> None:
    with pytest.raises(ConvergenceError, match="three seeds or more, not 2"):
        compare([run("a"), run("b")], seeds()[:2], 0.1, [])


def test_tensorboard_keeps_float32(tmp_path: Path) -> None:
    precise = run("precise")
    events = read_curves(write_events(tmp_path, precise.quantities), "events")
    assert events.quantities["lm_loss"][3] != precise.quantities["lm_loss"][3]
    for pair in ([precise, events], [events, precise]):
        verdicts = compare(pair, [], 0.1, [])
        assert len(verdicts) == 4
        assert all(v.passed for v in verdicts)
        assert all("rounded to float32" in v.finding for v in verdicts)


def test_tensorboard_shows_differences_of_float32(tmp_path: Path) -> None:
    events = read_curves(write_events(tmp_path, run("").quantities), "events")
    next_float = float(np.nextafter(np.float32(loss(7)), np.float32(99)))
    other = run("other", lambda i: next_float if i == 7 else loss(i))
    verdict = compare([events, other], [], 0.1, ["lm_loss"])[0]
    assert verdict.divergent == 7
    again = read_curves(write_events(tmp_path / "again", other.quantities), "again")
    verdict = compare([events, again], [], 0.1, ["lm_loss"])[0]
    assert verdict.divergent == 7
    assert "float32" not in verdict.finding


def test_noise_is_rounded_like_the_runs(tmp_path: Path) -> None:
    # A learning rate has no noise: in two precisions it would leave a band of no width.
    events = read_curves(write_events(tmp_path, run("").quantities), "events")
    verdicts = compare([run("a"), events], seeds(), 0.1, [])
    assert [v.passed for v in verdicts] == [True] * 4


def test_runs_logged_at_different_intervals() -> None:
    rare = run("rare", every=10)
    [verdict] = compare([run("often"), rare], [], 0.1, ["lm_loss"])
    assert verdict.passed
    assert verdict.finding.endswith(
        "compared in 10 common iterations: rare has 10 from 10 to 100, often has 100 from 1 to 100"
    )
    [verdict] = compare([rare, run("often")], [], 0.1, ["lm_loss"])
    assert verdict.passed
    high = run("high", shifted(0.02), every=10)
    [verdict] = compare([run("often"), high], seeds(), 0.1, ["lm_loss"])
    assert verdict.divergent == 10
    assert "seed 0 has 100 from 1 to 100" in verdict.finding
    assert png(draw_comparison([verdict])).startswith(b"\x89PNG")


def test_run_that_ends_too_early_is_not_alike() -> None:
    long, short = run("long", last=200), run("short", last=50)
    [verdict] = compare([long, short], [], 0.1, ["lm_loss"])
    assert not verdict.passed
    assert verdict.divergent == 51
    assert verdict.finding.startswith("ends at iteration 50, too early; the same numbers in 50")
    assert verdict.finding.endswith("short has 50 from 1 to 50, long has 200 from 1 to 200")
    [verdict] = compare([short, long], [], 0.1, ["lm_loss"])
    assert verdict.passed


def test_quantity_that_a_run_lacks_is_named() -> None:
    only_loss = replace(run("b"), quantities={"lm_loss": run("").quantities["lm_loss"]})
    [verdict] = compare([run("a"), only_loss], [], 0.1, [])
    assert "; it has no " in verdict.finding
    assert "lr" in verdict.finding.partition("; it has no ")[2]


def test_equally_logged_runs_need_no_remark() -> None:
    [verdict] = compare([run("a"), run("b")], [], 0.1, ["lm_loss"])
    assert "common" not in verdict.finding


def test_quantities_default_to_those_in_all_runs() -> None:
    only_loss = replace(run("b"), quantities={"lm_loss": run("").quantities["lm_loss"], "mfu": {}})
    assert [v.quantity for v in compare([run("a"), only_loss], [], 0.1, [])] == ["lm_loss"]
    with pytest.raises(ConvergenceError, match=r"b has no curve of lr \(it has lm_loss, mfu\)"):
        compare([run("a"), only_loss], [], 0.1, ["lr"])


def test_nothing_in_common() -> None:
    other = Curves("other", {"params-norm": {1: 1.0}})
    expected = "none of lm_loss, .* is in all runs: other has params-norm; a has grad_norm, "
    with pytest.raises(ConvergenceError, match=expected):
        compare([run("a"), other], [], 0.1, [])
    even = Curves("even", {"lm_loss": {2: 1.0, 4: 1.0}})
    odd = Curves("odd", {"lm_loss": {1: 1.0}})
    expected = (
        "no iteration of lm_loss is in all runs: odd has 1 from 1 to 1, even has 2 from 2 to 4"
    )
    with pytest.raises(ConvergenceError, match=expected):
        compare([even, odd], [], 0.1, [])


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([run("a")], "needs two runs or more, not 1"),
        ([run("a"), run("b"), run("a")], "must have different names, not a, b, a"),
    ],
)
def test_runs_that_cannot_be_compared(runs: list[Curves], expected: str) -> None:
    with pytest.raises(ConvergenceError, match=expected):
        compare(runs, [], 0.1, [])


def test_numbers_that_are_not_finite_are_not_equal() -> None:
    broken = run("a", lambda i: math.nan if i > 60 else loss(i))
    [verdict] = compare([broken, replace(broken, name="b")], [], 0.1, ["lm_loss"])
    assert verdict.divergent == 61


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConvergenceError, match=r"neither a metrics\.jsonl, nor a folder"):
        read_curves(tmp_path / "missing")
    with pytest.raises(ConvergenceError, match=r"neither a metrics\.jsonl, nor a folder"):
        read_curves(tmp_path)
    for content in (b"loss 3\n", b"[1]\n", b"\xff\xfe\n"):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with pytest.raises(ConvergenceError, match="not lines of metrics"):
            read_curves(tmp_path)
    events = tmp_path / "events" / "events.out.tfevents.1.host"
    events.parent.mkdir()
    events.write_bytes(b"not events" * 20)
    broken = read_curves(events.parent, "broken")
    with pytest.raises(ConvergenceError, match="broken has nothing"):
        compare([run("a"), broken], [], 0.1, [])


def test_event_file_of_a_killed_process(tmp_path: Path) -> None:
    write_events(tmp_path, run("", last=30).quantities)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    [verdict] = compare([run("a"), read_curves(tmp_path, "cut")], [], 0.1, ["lm_loss"])
    assert verdict.finding.startswith("ends at iteration 30, too early; the same numbers in 30")
    assert "cut has 30 from 1 to 30, a has 100 from 1 to 100" in verdict.finding
