"""Which runs are trained when, and what is said of those that fail; nothing is trained here."""

import dataclasses
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dion_tools.local import runs as runs_module
from megatron_dion_tools.local.flags import effective, read_flags, split_flags
from megatron_dion_tools.local.runs import Run, RunFailed, execute, train

FORK = multiprocessing.get_context("fork")
TOO_LONG = 60  # seconds, after which a test that hangs fails
Fake = Callable[[str], None]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", ""),
        ("--lr 1 --bf16", "--lr 1 --bf16"),
        ("--lr 1 --bf16 --lr 2", "--lr 2 --bf16"),
        ("--lr 1 --lr 2 --lr 3", "--lr 3"),
        ("--betas 0.9 0.95 --seed 1 --betas 0.8", "--betas 0.8 --seed 1"),
        ("--lr 1 --lr=2 --lr 3", "--lr 3"),
        ("--lr=1 --bf16 --lr=-2", "--lr=-2 --bf16"),
        ("--min-lr -1 --lr 1", "--min-lr -1 --lr 1"),
    ],
)
def test_the_later_of_two_flags_counts(given: str, kept: str) -> None:
    assert effective(given.split()) == tuple(kept.split())


def test_flags_are_read_as_a_shell_would(tmp_path: Path) -> None:
    (tmp_path / "small.args").write_text("--lr 1  # --lr 2\n# nothing\n--name 'a b'\n")
    assert read_flags(tmp_path / "small.args") == ("--lr", "1", "--name", "a b")
    assert split_flags(" --name 'a b' --lr  1\n") == ("--name", "a b", "--lr", "1")


def named(folder: Path, name: str, processes: int = 1) -> Run:
    return Run(name, folder / name, ("--name", name), processes)


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """Where ranks write, in the order in which they do things."""
    (tmp_path / "events").touch()
    return tmp_path / "events"


def note(events: Path, what: str) -> None:
    with events.open("a") as file:
        file.write(what + "\n")


@pytest.fixture
def train_by(monkeypatch: pytest.MonkeyPatch, events: Path) -> Callable[[Fake], None]:
    """Takes the place of training: ranks call a function with the name of their run."""

    def replace(function: Fake) -> None:
        def fake(flags: Sequence[str], patch: str | None) -> None:
            assert flags[2] == "--run-dir"
            note(events, f"+ {flags[1]}")
            function(flags[1])
            note(events, f"- {flags[1]}")

        monkeypatch.setattr(runs_module, "train", fake)

    return replace


def nothing(_: str) -> None:
    pass


@pytest.mark.parametrize(
    "other",
    [
        {"flags": ("--lr", "2")},
        {"flags": ("--lr", "1", "--bf16")},
        {"processes": 2},
        {"patch": "module:function"},
    ],
)
def test_a_run_is_finished_with_the_same_settings_only(
    tmp_path: Path, other: dict[str, object]
) -> None:
    run = Run("run", tmp_path, ("--lr", "1"))
    assert not run.is_finished()
    run.mark_finished()
    assert run.is_finished()
    assert dataclasses.replace(run, name="another name").is_finished()
    assert not dataclasses.replace(run, **other).is_finished()


def test_a_run_whose_end_was_not_written_to_the_end_is_not_finished(tmp_path: Path) -> None:
    run = Run("run", tmp_path, ("--lr", "1"))
    run.mark_finished()
    (tmp_path / "finished.json").write_text((tmp_path / "finished.json").read_text()[:20])
    assert not run.is_finished()


def test_finished_runs_are_not_trained_again(
    tmp_path: Path, events: Path, train_by: Callable[[Fake], None]
) -> None:
    train_by(nothing)
    said: list[str] = []
    one, two = named(tmp_path, "one"), named(tmp_path, "two")
    execute([one], 1, said.append)
    execute([one, two], 1, said.append)
    assert events.read_text().split() == ["+", "one", "-", "one", "+", "two", "-", "two"]
    assert one.is_finished()
    assert two.is_finished()
    assert [line.partition(" s,")[0].rpartition(":")[0] for line in said if "min" in line] == [
        "run 1/1: one",
        "run 1/1: two",
    ]
    assert said[1] == "1 of 2 runs were finished before"


def test_a_run_with_other_flags_starts_from_nothing(
    tmp_path: Path, train_by: Callable[[Fake], None]
) -> None:
    train_by(nothing)
    run = named(tmp_path, "one")
    execute([run], 1, nothing)
    (run.folder / "metrics.jsonl").write_text("old")
    other = dataclasses.replace(run, flags=("--name", "other"))
    execute([other], 1, nothing)
    assert sorted(path.name for path in run.folder.iterdir()) == ["finished.json", "train.log"]
    assert other.is_finished()
    assert not run.is_finished()


def test_what_ranks_print_is_in_the_log(tmp_path: Path, train_by: Callable[[Fake], None]) -> None:
    def write(_: str) -> None:
        os.write(1, b"output\n")
        os.write(2, b"errors\n")

    train_by(write)
    run = named(tmp_path, "one")
    execute([run], 1, nothing)
    assert (run.folder / "train.log").read_text() == "output\nerrors\n"


def test_a_failure_explains_itself_by_the_end_of_its_log(
    tmp_path: Path, train_by: Callable[[Fake], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: str) -> None:
        os.write(1, b"".join(b"line %d\n" % i for i in range(100)))
        raise ValueError("the loss is not finite")

    train_by(fail)
    run = named(tmp_path, "one")
    with capfd.disabled(), pytest.raises(RunFailed) as error:  # a rank prints where pytest listens
        execute([run], 1, nothing)
    *log, last = str(error.value).splitlines()
    assert last == f"one failed; its log is {run.folder / 'train.log'}"
    assert "ValueError: the loss is not finite" in log
    assert len(log) == 15
    assert (run.folder / "train.log").read_text().startswith("line 0\n")
    assert not run.is_finished()


def test_a_rank_that_dies_is_a_failure(
    tmp_path: Path, train_by: Callable[[Fake], None], capfd: pytest.CaptureFixture[str]
) -> None:
    train_by(lambda _: os._exit(0))
    with capfd.disabled(), pytest.raises(RunFailed, match=r"^rank 0 died\none failed; its log is"):
        execute([named(tmp_path, "one")], 1, nothing)


def test_a_run_that_cannot_write_its_log_fails(
    tmp_path: Path, train_by: Callable[[Fake], None]
) -> None:
    train_by(nothing)
    (tmp_path / "one").touch()
    with pytest.raises(RunFailed, match=r"^below one failed; its log is"):
        execute([Run("below one", tmp_path / "one" / "run", ())], 1, nothing)


def test_a_failure_ends_the_runs_beside_it_and_starts_no_others(
    tmp_path: Path, events: Path, train_by: Callable[[Fake], None]
) -> None:
    together = FORK.Barrier(2)

    def fail_or_wait(name: str) -> None:
        (tmp_path / f"{name}.pid").write_text(str(os.getpid()))
        together.wait(TOO_LONG)
        if name == "bad":
            raise ValueError
        signal.alarm(TOO_LONG)
        signal.pause()

    train_by(fail_or_wait)
    long, bad, later = (named(tmp_path, name) for name in ("long", "bad", "later"))
    with pytest.raises(RunFailed, match="bad failed"):
        execute([long, bad, later], 2, nothing)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "long.pid").read_text()), 0)
    assert sorted(events.read_text().splitlines()) == ["+ bad", "+ long"]
    assert not long.is_finished()


def test_as_many_runs_at_a_time_as_there_are_slots(
    tmp_path: Path, train_by: Callable[[Fake], None]
) -> None:
    together = FORK.Barrier(3)

    def meet(_: str) -> None:
        together.wait(TOO_LONG)

    train_by(meet)
    runs = [named(tmp_path, name) for name in "abcdef"]
    execute(runs, 3, nothing)
    assert all(run.is_finished() for run in runs)


@pytest.mark.parametrize(
    ("processes", "jobs", "beside"),
    [
        ([1, 1, 1], 1, ["0", "1", "2"]),
        ([1, 1, 1, 1], 2, ["01", "12", "23", "3"]),
        ([2, 1, 1, 2], 3, ["01", "12", "23", "3"]),
        ([1, 3, 1, 1], 2, ["0", "1", "23", "3"]),
    ],
)
def test_never_more_processes_than_jobs_unless_a_run_alone_has_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: list[int],
    jobs: int,
    beside: list[str],
) -> None:
    seen: list[str] = []

    class Process:
        """Runs until it is the oldest of those that are waited for."""

        exitcode = 0

        def __init__(self, target: object, args: tuple[Run]) -> None:
            self.sentinel = args[0].name
            self.start = args[0].folder.mkdir

        def join(self) -> None:
            pass

    def wait(sentinels: list[str]) -> list[str]:
        seen.append("".join(sentinels))
        return sentinels[:1]

    monkeypatch.setattr(type(FORK), "Process", Process)
    monkeypatch.setattr(runs_module, "wait", wait)
    execute([named(tmp_path, str(i), size) for i, size in enumerate(processes)], jobs, nothing)
    assert seen == beside


def test_a_mistake_is_made_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[object] = []
    launch = SimpleNamespace(train=lambda flags: done.append(flags), done=done)
    monkeypatch.setitem(sys.modules, "megatron_dion.megatron.launch", launch)
    mistakes = tmp_path / "mistakes.py"
    mistakes.write_text(
        "from megatron_dion.megatron.launch import done\ndef make(): done.append('mistake')\n"
    )
    train(["--lr", "1"], None)
    train(["--lr", "2"], f"{mistakes}:make")
    assert done == [["--lr", "1"], "mistake", ["--lr", "2"]]
