import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_dion_tools.convergence import environment
from megatron_dion_tools.convergence.curves import Curve, Curves
from megatron_dion_tools.convergence.environment import (
    describe,
    different_data,
    same_arithmetic,
)
from megatron_dion_tools.convergence.errors import ConvergenceError
from megatron_dion_tools.convergence.golden import (
    Golden,
    difference,
    read_golden,
    require_finite,
    write_golden,
)

HERE: environment.Environment = {"torch": "2.9.0", "processor": "EPYC", "data": None}
AWKWARD = {1: 0.1 + 0.2, 2: 5e-324, 3: math.nextafter(1 / 3, 1), 4: -0.0, 5: 1e22, 60: 7.0}


def golden(**runs: Mapping[int, Mapping[str, Curve]]) -> Golden:
    """Golden curves from quantities by name of run and seed."""
    return Golden(
        environment=HERE,
        commands={name: f"--run {name}" for name in runs},
        curves={
            name: {
                seed: Curves(f"golden {name}, seed {seed}", quantities)
                for seed, quantities in seeds.items()
            }
            for name, seeds in runs.items()
        },
    )


def losses(*values: float) -> dict[str, Curve]:
    return {"lm_loss": dict(enumerate(values, start=1))}


def bits(curve: Curve) -> dict[int, str]:
    return {iteration: value.hex() for iteration, value in curve.items()}


def test_what_was_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    written = golden(one={1: {"lm_loss": AWKWARD, "lr": {1: 1e-3}}, 2: losses(1.0)})
    write_golden(tmp_path / "golden" / "case.jsonl", written)
    read = read_golden(tmp_path / "golden" / "case.jsonl")
    assert read == written
    assert bits(read.curves["one"][1].curve("lm_loss")) == bits(AWKWARD)


def test_a_line_for_each_curve_that_is_worth_keeping(tmp_path: Path) -> None:
    kept = {name: {1: 1.0} for name in ("lm_loss", "grad_norm", "lr", "validation_loss")}
    write_golden(tmp_path / "case.jsonl", golden(one={1: {**kept, "test_loss": {1: 1.0}}}))
    header, *lines = map(json.loads, (tmp_path / "case.jsonl").read_text().splitlines())
    assert set(header) == {"environment", "commands"}
    assert [line["quantity"] for line in lines] == list(kept)
    assert set(read_golden(tmp_path / "case.jsonl").curves["one"][1].quantities) == set(kept)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_become_golden(tmp_path: Path, value: float) -> None:
    path = tmp_path / "case.jsonl"
    write_golden(path, golden(one={1: losses(1.0)}))
    before = path.read_bytes()
    wrong = golden(one={1: losses(1.0), 2: losses(1.0, value)})
    message = f"one, seed 2: lm_loss is {value} at iteration 2"
    with pytest.raises(ConvergenceError, match=message):
        require_finite(wrong)
    with pytest.raises(ConvergenceError, match=message):
        write_golden(path, wrong)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_seeds_of_a_run() -> None:
    kept = golden(one={1: losses(1.0), 2: losses(2.0)})
    assert [curves.name for curves in kept.seeds("one")] == [
        "golden one, seed 1",
        "golden one, seed 2",
    ]
    with pytest.raises(ConvergenceError, match=r"no golden curves of run 'two' \(there are: one\)"):
        kept.seeds("two")


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (None, {1: losses(2.0), 2: losses(2.0)}, ["one: new, 2 seeds"]),
        ({1: losses(2.0, 1.0)}, {1: losses(2.0, 1.0)}, ["one: lm_loss: unchanged"]),
        (
            {1: losses(3.0, 2.0, 1.0), 2: losses(3.0, 2.0, 1.0)},
            {1: losses(3.0, 2.25, 1.0), 2: losses(3.0, 2.0, 1.5)},
            ["one: lm_loss: differs from iteration 2, most at 3 (seed 2): by 0.5"],
        ),
        (
            {1: losses(3.0)},
            {1: losses(3.0), 2: losses(3.0)},
            ["one: seeds 1, 2 instead of 1", "one: lm_loss: unchanged"],
        ),
        ({1: losses(3.0)}, {2: losses(3.0)}, ["one: seeds 2 instead of 1"]),
        (
            {1: losses(3.0, 2.0)},
            {1: losses(3.0, 2.0, 1.0)},
            ["one: lm_loss: 3 iterations instead of 2 (seed 1)"],
        ),
        (
            {1: losses(3.0, 2.0)},
            {1: losses(3.5)},
            [
                "one: lm_loss: 1 iterations instead of 2 (seed 1)",
                "one: lm_loss: differs from iteration 1, most at 1 (seed 1): by 0.5",
            ],
        ),
        (
            {1: losses(3.0)},
            {1: {**losses(3.0), "lr": {1: 1.0}}},
            ["one: lm_loss: unchanged", "one: lr: 1 iterations instead of 0 (seed 1)"],
        ),
    ],
)
def test_changes_are_told_in_words(
    old: Mapping[int, dict[str, Curve]] | None,
    new: Mapping[int, dict[str, Curve]],
    lines: list[str],
) -> None:
    assert difference(None if old is None else golden(one=old), golden(one=new)) == lines


def test_runs_that_are_new_or_gone_are_named() -> None:
    seeds = {1: losses(1.0)}
    old, new = golden(b=seeds, a=seeds, kept=seeds), golden(kept=seeds, c=seeds)
    assert difference(old, new) == [
        "kept: lm_loss: unchanged",
        "c: new, 1 seeds",
        "a: removed",
        "b: removed",
    ]


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConvergenceError, match=r"case\.jsonl: no golden curves yet; make .*update"):
        read_golden(tmp_path / "case.jsonl")


LINE = '{"run": "one", "seed": 1, "quantity": "lr", "iterations": [1, 2], "values": [1.0]}'


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param('{"environment": {', id="torn"),
        pytest.param('{"environment": {}}\n', id="no commands"),
        pytest.param("[]\n", id="a list"),
        pytest.param('{"environment": {}, "commands": {}}\n{"run": "one"}\n', id="no seed"),
        pytest.param('{"environment": {}, "commands": {}}\n' + LINE, id="too few values"),
        pytest.param('{"environment": {}, "commands": {}}\n<<<<<<< HEAD\n', id="merge conflict"),
        pytest.param("\udcff", id="no text"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "case.jsonl"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ConvergenceError, match=r"case\.jsonl: no golden curves in it"):
        read_golden(path)


@pytest.mark.parametrize("name", ["torch", "megatron-core", "numpy", "processor", "instructions"])
def test_bits_depend_on_software_and_processor(name: str) -> None:
    here = describe([])
    there = {**here, name: "other"}
    assert here[name]
    assert same_arithmetic(here, here)
    assert not same_arithmetic(here, there)
    assert environment.difference(here, there) == f"{name} {here[name]} is other here"


@pytest.mark.parametrize("name", ["revision", "megatron_dion", "python"])
def test_bits_do_not_depend_on_what_is_being_checked(name: str) -> None:
    here = describe([])
    assert same_arithmetic(here, {**here, name: "other"})
    assert environment.difference(here, {**here, name: "other"}) == ""


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Flags that name a tokenizer and data."""
    for name in ("tokenizer.model", "train.bin", "train.idx"):
        (tmp_path / name).write_bytes(f"bytes of {name}".encode())
    tokenizer, train = tmp_path / "tokenizer.model", tmp_path / "train"
    return ["--tokenizer-model", str(tokenizer), "--train-data-path", str(train), "--lr", "1"]


@pytest.mark.parametrize(
    ("file", "different"),
    [("tokenizer.model", "tokenizer"), ("train.bin", "data"), ("train.idx", "data")],
)
def test_a_byte_of_the_data_is_noticed(
    tmp_path: Path, data: list[str], file: str, different: str
) -> None:
    before = describe(data)
    assert different_data(before, describe(data)) == []
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-1] + b"!")
    assert different_data(before, describe(data)) == [different]
    assert same_arithmetic(before, describe(data))


def test_data_is_the_same_wherever_it_lies(tmp_path: Path, data: list[str]) -> None:
    before = describe(data)
    moved = [flag.replace(str(tmp_path), str(tmp_path / "moved")) for flag in data]
    (tmp_path / "moved").mkdir()
    for name in ("tokenizer.model", "train.bin", "train.idx"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert different_data(before, describe(moved)) == []


def test_large_data_is_known_by_its_index_and_size(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = (tmp_path / "train.idx").stat().st_size
    (tmp_path / "train.bin").write_bytes(b"a" * (index + 1))
    monkeypatch.setattr(environment, "_HASHED_BYTES", index)
    before = describe(data)
    (tmp_path / "train.bin").write_bytes(b"b" * (index + 1))
    assert different_data(before, describe(data)) == []
    (tmp_path / "train.bin").write_bytes(b"b" * (index + 2))
    assert different_data(before, describe(data)) == ["data"]


def test_flags_without_data_have_no_hashes(data: list[str]) -> None:
    bare = describe(["--mock-data"])
    assert (bare["tokenizer"], bare["data"]) == (None, None)
    assert different_data(bare, describe(data)) == ["tokenizer", "data"]


def test_a_blend_of_data_is_hashed(tmp_path: Path) -> None:
    for name in ("a.bin", "a.idx", "b.bin", "b.idx"):
        (tmp_path / name).write_text(name)
    blend = ["--lr", "1", "--train-data-path", "0.5", f"{tmp_path}/a", "0.5", f"{tmp_path}/b"]
    before = environment.describe(blend)["data"]
    assert before is not None
    assert environment.describe([f"--data-path={tmp_path}/a"])["data"] not in (None, before)
    (tmp_path / "b.bin").write_text("c.bin")
    assert environment.describe(blend)["data"] != before
