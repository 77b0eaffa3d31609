"""How the benchmarks measure, compare and report."""

import json
from pathlib import Path

import pytest

from benchmarks import _common
from benchmarks._common import Summary, interleaved, make_parser, parse, ratio, report, table


def test_cases_are_measured_in_turns_after_a_round_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    now = 0.0

    def spend(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds * (1 + 9 * (len(calls) < 2))  # the first round is slower
        calls.append(name)

    monkeypatch.setattr(_common.time, "process_time", lambda: now)
    times = interleaved({"a": lambda: spend("a", 1), "b": lambda: spend("b", 2)}, 2, "cpu")
    assert calls == 3 * ["a", "b"]
    assert times == {"a": [1000, 1000], "b": [2000, 2000]}


def test_ratios_are_those_of_the_same_round() -> None:
    drifting = [1.0, 2.0, 8.0, 3.0]
    assert ratio([2.0, 4.0, 16.0, 6.0], drifting) == Summary(2, 2, 2)
    assert ratio([5.0, 1, 2, 4, 3], [1.0] * 5) == Summary(3, 2, 4)
    assert ratio([7.0], [1.0]) == Summary(7, 7, 7)


def test_columns_are_aligned() -> None:
    rows = [{"name": "a", "value_ms": 1234.5678}, {"name": "long", "value_ms": None}]
    assert table(rows).splitlines() == ["name  value_ms", "   a      1235", "long         -"]


def test_the_first_rank_prints_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new folder" / "result.json"
    argv = ["--output", str(output), "--repeats", "3", "--device", "cpu"]
    args = parse(make_parser("what is measured", repeats=9), argv)
    tables = {"nothing": [], "things": [{"thing": "one", "ms": 0.5}]}
    monkeypatch.setenv("RANK", "1")
    report(args, tables)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    report(args, tables)
    assert capsys.readouterr().out == "\nthings\nthing   ms\n  one  0.5\n"
    content = json.loads(output.read_text())
    assert content["tables"] == {"things": [{"thing": "one", "ms": 0.5}]}
    assert content["options"] == {"repeats": 3, "device": "cpu"}
    assert {"processor", "cores", "torch", "revision"} <= content["machine"].keys()
