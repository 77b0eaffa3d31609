"""How the benchmarks measure, compare and report; what they measure is in tests/distributed."""

import json
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import _common
from benchmarks._common import (
    Case,
    Goal,
    Summary,
    interleaved,
    make_parser,
    parse,
    ratio,
    report,
    summary,
    table,
)


def test_cases_are_measured_in_turns_after_a_round_that_does_not_count() -> None:
    calls: list[str] = []
    cases = {
        "a": Case(lambda: calls.append("a")),
        "b": Case(lambda: calls.append("b"), prepare=lambda: calls.append("prepare b")),
    }
    timings = interleaved(cases, repeats=2)
    assert calls == 3 * ["a", "prepare b", "b"]
    assert {name: len(timing.wall) for name, timing in timings.items()} == {"a": 2, "b": 2}
    assert all(len(timing.processor) == 2 for timing in timings.values())


def test_only_the_case_itself_is_timed() -> None:
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def wall() -> float:
        return now

    def processor() -> float:
        return now / 4

    case = Case(lambda: spend(2), prepare=lambda: spend(100))
    with (
        mock.patch.object(_common.time, "perf_counter", wall),
        mock.patch.object(_common.time, "process_time", processor),
    ):
        timing = interleaved({"case": case}, repeats=3)["case"]
    assert timing.wall == [2, 2, 2]
    assert timing.processor == [0.5, 0.5, 0.5]
    assert timing.cost("cpu") == timing.processor
    assert timing.cost("cuda") == timing.wall


def test_ratios_are_those_of_the_same_round() -> None:
    drifting, twice = [1.0, 2.0, 8.0, 3.0], [2.0, 4.0, 16.0, 6.0]
    assert ratio(twice, drifting) == Summary(2, 2, 2)


def test_summary_has_median_and_quartiles() -> None:
    assert summary([5, 1, 2, 4, 3]) == Summary(3, 2, 4)
    assert summary([7]) == Summary(7, 7, 7)


def test_columns_are_aligned() -> None:
    rows = [{"name": "a", "value_ms": 1234.5678}, {"name": "long", "value_ms": None}]
    assert table(rows).splitlines() == ["name  value_ms", "   a      1235", "long         -"]


def test_a_report_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new folder" / "result.json"
    argv = ["--output", str(output), "--repeats", "3", "--device", "cpu"]
    args = parse(make_parser("what is measured", repeats=9), argv)
    goals = [Goal("small", 1.0, 1.0), Goal("large", 1.01, 1.0)]
    report(args, {"nothing": [], "things": [{"thing": "one", "ms": 0.5}]}, goals)
    printed = capsys.readouterr().out
    assert "goal: small: 1, at most 1: met\n" in printed
    assert "goal: large: 1.01, at most 1: NOT MET\n" in printed
    content = json.loads(output.read_text())
    assert content["tables"] == {"things": [{"thing": "one", "ms": 0.5}]}
    assert [goal["is_met"] for goal in content["goals"]] == [True, False]
    assert content["options"] == {"repeats": 3, "threads": 1, "device": "cpu"}
    described = content["machine"]
    assert described["backend"] == "gloo"
    assert described["blas"] != "unknown"
    assert {"processor", "cores", "threads", "torch", "revision"} <= described.keys()


def test_only_the_first_rank_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parse(make_parser("", repeats=1), ["--device", "cpu"])
    monkeypatch.setenv("RANK", "1")
    report(args, {"things": [{"ms": 1}]})
    assert capsys.readouterr().out == ""
