"""Which runs train when, what is said of those that fail, and that no process is left behind."""

import dataclasses
import multiprocessing
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from megatron_dion_tools.local import runs as runs_module
from megatron_dion_tools.local.flags import effective, read_flags
from megatron_dion_tools.local.runs import Run, RunFailed, execute

FORK = multiprocessing.get_context("fork")
TOO_LONG = 60  # seconds, after which a test that hangs fails
Fake = Callable[[str], None]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", ""),
        ("--lr 1 --bf16 --lr 2", "--lr 2 --bf16"),
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


@pytest.fixture
def train_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Fake], Path]:
    """Takes the place of training: a rank calls a function with the name of its run.

    Returns the file in which ranks note what they begin and what they have done.
    """
    events = tmp_path / "events"
    events.touch()

    def note(what: str) -> None:
        with events.open("a") as file:
            file.write(what + "\n")

    def replace(function: Fake) -> Path:
        def fake(flags: Sequence[str], patch: str | None) -> None:
            assert flags[2] == "--run-dir"
            note(f"+{flags[1]}")
            function(flags[1])
            note(f"-{flags[1]}")

        monkeypatch.setattr(runs_module, "train", fake)
        return events

    return replace


def named(folder: Path, name: str, processes: int = 1) -> Run:
    return Run(name, folder / name, ("--name", name), processes)


def nothing(_: str) -> None:
    pass


@pytest.mark.parametrize(
    "other", [{"flags": ("--lr", "2")}, {"processes": 2}, {"patch": "module:function"}]
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
    mark = tmp_path / "finished.json"
    mark.write_text(mark.read_text()[:20])  # a machine that lost its power
    assert not run.is_finished()


def test_only_what_is_not_finished_trains_and_starts_from_nothing(
    tmp_path: Path, train_by: Callable[[Fake], Path]
) -> None:
    events = train_by(say_output)
    said: list[str] = []
    one, two = named(tmp_path, "one"), named(tmp_path, "two")
    execute([one], 1, said.append)
    (two.folder).mkdir()
    (two.folder / "metrics.jsonl").write_text("of other flags")
    execute([one, two], 1, said.append)
    assert events.read_text().split() == ["+one", "-one", "+two", "-two"]
    assert said[2:] == ["1 of 2 runs to train", "trained two; 0 runs left"]
    assert {path.name for path in two.folder.iterdir()} == {"finished.json", "train.log"}
    assert (two.folder / "train.log").read_text() == "output\n"


def say_output(_: str) -> None:
    os.write(1, b"output\n")


def raise_error(_: str) -> None:
    os.write(1, b"".join(b"line %d\n" % i for i in range(100)))
    raise ValueError("the loss is not finite")


@pytest.mark.parametrize(
    ("function", "said"),
    [(raise_error, "ValueError: the loss is not finite"), (lambda _: os._exit(0), "rank 0 died")],
)
def test_a_failure_shows_the_end_of_its_log(
    tmp_path: Path,
    train_by: Callable[[Fake], Path],
    capfd: pytest.CaptureFixture[str],
    function: Fake,
    said: str,
) -> None:
    train_by(function)
    run = named(tmp_path, "one")
    with capfd.disabled(), pytest.raises(RunFailed) as error:  # a rank prints where pytest listens
        execute([run], 1, nothing)
    *log, last = str(error.value).splitlines()
    assert last == f"one failed; its log is {run.folder / 'train.log'}"
    assert said in log
    assert len(log) <= 15
    assert not run.is_finished()


def test_a_failure_ends_the_runs_beside_it_and_starts_no_others(
    tmp_path: Path, train_by: Callable[[Fake], Path]
) -> None:
    together = FORK.Barrier(2)

    def fail_or_wait(name: str) -> None:
        (tmp_path / f"{name}.pid").write_text(str(os.getpid()))
        together.wait(TOO_LONG)
        if name == "bad":
            raise ValueError
        signal.alarm(TOO_LONG)
        signal.pause()

    events = train_by(fail_or_wait)
    with pytest.raises(RunFailed, match="bad failed"):
        execute([named(tmp_path, name) for name in ("long", "bad", "later")], 2, nothing)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "long.pid").read_text()), 0)
    assert sorted(events.read_text().split()) == ["+bad", "+long"]


def test_no_more_ranks_than_jobs_unless_a_run_alone_has_more(
    tmp_path: Path, train_by: Callable[[Fake], Path]
) -> None:
    events = train_by(nothing)
    execute([named(tmp_path, str(i), size) for i, size in enumerate([1, 3, 1])], 1, nothing)
    begun_or_done = [line[1] for line in events.read_text().split()]
    assert begun_or_done == ["0"] * 2 + ["1"] * 6 + ["2"] * 2


# No process is left behind


def wait_for_ever(write_end: int) -> None:
    """On a rank: start a helper, as a rank that saves does, say so, and never come back."""
    helper = FORK.Process(target=signal.pause)
    helper.start()
    os.write(write_end, b"x")
    helper.join()


def train_runs(read_end: int, write_end: int, folder: Path) -> None:
    os.close(read_end)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # for the traceback of an interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    runs_module.train = lambda flags, patch: wait_for_ever(write_end)
    execute([named(folder, name) for name in ("one", "two")], 2, nothing)


@contextmanager
def parent_of_runs(
    function: Callable[..., None], folder: Path
) -> Iterator[tuple[BaseProcess, int]]:
    """A process that trains, and a pipe that ends when all processes that it began have ended."""
    read_end, write_end = os.pipe()
    parent = FORK.Process(target=function, args=(read_end, write_end, folder))
    parent.start()
    os.close(write_end)
    try:
        yield parent, read_end
    finally:
        parent.kill()
        parent.join(TOO_LONG)
        os.close(read_end)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    with parent_of_runs(train_runs, tmp_path) as (parent, read_end):
        for _ in range(2):
            assert read_byte(read_end) == b"x"
        os.kill(parent.pid or 0, how)
        assert read_byte(read_end) == b""


def interrupt_of_a_fork(*args: Any) -> None:
    """Python calls the hook in the middle of a fork, and drops what the signal raises in it."""
    me = os.getpid()
    os.register_at_fork(after_in_parent=lambda: os.getpid() == me and os.kill(me, signal.SIGINT))
    train_runs(*args)


def test_an_interrupt_in_the_middle_of_a_fork_is_not_lost(tmp_path: Path) -> None:
    with parent_of_runs(interrupt_of_a_fork, tmp_path) as (_, read_end):
        while read_byte(read_end):
            pass


def read_byte(end: int) -> bytes:
    ready, _, _ = select.select([end], [], [], TOO_LONG)
    assert ready, "processes go on"
    return os.read(end, 1)
