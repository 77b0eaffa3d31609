"""The doctor on worlds of gloo ranks, some of them ill."""

import contextlib
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dion_tools.doctor import doctor, links
from megatron_dion_tools.doctor.doctor import Options, run
from megatron_dion_tools.doctor.findings import Check, Finding
from megatron_dion_tools.doctor.world import World
from megatron_dion_tools.local.world import run_world

Illness = Callable[[], None]
LARGE = 2**16


def examine(options: Options, illness: Illness | None = None) -> tuple[int, str, str]:
    """On a rank: the exit code of the doctor, what it says on stdout and on stderr."""
    links.LARGE = {"cpu": LARGE}
    if illness is not None:
        illness()
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()) as complained,
    ):
        code = run(options, os.environ)
    return code, said.getvalue(), complained.getvalue()


def on(rank: int, change: Illness) -> Illness:
    return lambda: change() if os.environ["RANK"] == str(rank) else None


def row(table: str, check: str, verdict: str) -> str:
    """What follows the name of a check and this verdict, on the one line that begins with them."""
    cells = (line.removeprefix(f"{check} ").split() for line in table.splitlines())
    lines = zip(table.splitlines(), cells, strict=True)
    [found] = [
        rest for line, (first, *rest) in lines if line.startswith(f"{check} ") and first == verdict
    ]
    return " ".join(found)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_healthy_world(size: int, tmp_path: Path) -> None:
    answers = run_world(size, examine, Options(shared_folder=tmp_path, run_dir=tmp_path))
    assert [code for code, _, _ in answers] == [0] * size, answers
    table = answers[0][1]
    assert all(said == "" for _, said, _ in answers[1:])
    assert all(complained == "" for _, _, complained in answers)
    ranks = {1: "0", 2: "0-1", 3: "0-2"}[size]
    for check in ("all_reduce", "all_gather", "messages", "shared folder", "python"):
        assert row(table, check, "ok").startswith(f"{ranks} "), table
    if size > 1:
        assert "\nclocks " in table
        assert f"slowest of {size if size > 2 else 1} is " in table
    assert list(tmp_path.iterdir()) == []


def wrong_sum() -> None:
    right = dist.all_reduce

    def wrong(tensor: torch.Tensor, *args: Any) -> None:
        right(tensor, *args)
        tensor[5] += 1

    dist.all_reduce = wrong


def wrong_piece() -> None:
    right = dist.all_gather

    def wrong(pieces: list[torch.Tensor], piece: torch.Tensor) -> None:
        right(pieces, piece + 1)

    dist.all_gather = wrong


def wrong_messages(length: int) -> Illness:
    """Makes a rank send wrong content in all messages of one length."""

    def fall_ill() -> None:
        right = dist.send

        def wrong(message: torch.Tensor, peer: int) -> None:
            right(message ^ 4 if len(message) == length else message, peer)

        dist.send = wrong

    return fall_ill


def test_rank_with_a_wrong_sum_is_named() -> None:
    answers = run_world(3, examine, Options(), on(1, wrong_sum))
    assert [code for code, _, _ in answers] == [1, 1, 1]
    table = answers[0][1]
    assert row(table, "all_reduce", "failed") == "1 1 of 4096 sums are wrong here"
    assert row(table, "all_reduce", "ok").startswith("0, 2 ")
    assert row(table, "all_gather", "ok").startswith("0-2 ")
    assert "failed: all_reduce" in table.splitlines()[-1]


def test_rank_that_gives_wrong_pieces_is_named() -> None:
    table = run_world(3, examine, Options(), on(2, wrong_piece))[0][1]
    assert row(table, "all_gather", "failed") == "0-2 what comes from rank 2 is wrong here"


@pytest.mark.parametrize("length", [links.SMALL, LARGE])
def test_rank_that_sends_wrong_messages_is_named(length: int) -> None:
    table = run_world(2, examine, Options(), on(1, wrong_messages(length)))[0][1]
    assert row(table, "messages", "failed").startswith("0 messages from rank 1 arrive")
    assert row(table, "messages", "ok").startswith("1 ")


def examine_unless(rank: int, options: Options) -> tuple[int, str, str]:
    """On a rank: as `examine`, but one of them never comes."""
    return (0, "", "") if os.environ["RANK"] == str(rank) else examine(options)


def test_rank_that_never_comes_is_named() -> None:
    answers = run_world(3, examine_unless, 2, Options(patience=3))
    assert [code for code, _, _ in answers[:2]] == [1, 1]
    table = answers[0][1]
    assert "2 did not come to 'start' within 3 s" in row(table, "ranks", "failed")
    assert row(table, "python", "ok").startswith("0")
    for check in ("clocks", "all_reduce"):  # of all ranks
        assert f"\n{check} " not in table


def test_rank_zero_that_never_comes_is_named() -> None:
    [_, (code, said, complained)] = run_world(2, examine_unless, 0, Options(patience=1))
    assert (code, said) == (1, "")
    assert "rank 1: no rank 0 answers at 127.0.0.1" in complained


def hang() -> None:
    """Lets the sum of rank 1 never begin; that of other ranks never ends then."""
    give_up_soon_on("all_reduce")
    on(1, lambda: setattr(dist, "all_reduce", lambda *args: threading.Event().wait()))()


def give_up_soon_on(check: str) -> None:
    """Leaves all other checks the time that a busy machine may need."""
    right = doctor.examine

    def examine_briefly(name: str, function: Check, seconds: float) -> Finding:
        return right(name, function, 0.5 if name == check else seconds)

    doctor.examine = examine_briefly


def test_collective_that_hangs_has_an_end() -> None:
    answers = run_world(2, examine, Options(), hang)
    assert [code for code, _, _ in answers] == [1, 1]
    table = answers[0][1]
    assert row(table, "all_reduce", "failed").startswith("0-1 no end within 0.5 s")
    assert "all_gather" not in table


def vanish() -> None:
    """Lets rank 1 send no report, and rank 0 wait less for that than for all else."""
    right = World.gather

    def gather(self: World, place: str, words: str) -> dict[int, str]:
        self.patience = 0.5
        return right(self, place, words) if self.rank == 0 else {}

    World.gather = gather  # type: ignore[method-assign]


def test_rank_that_vanishes_in_between_is_named() -> None:
    table = run_world(2, examine, Options(), vanish)[0][1]
    assert "rank 1 did not come to 'report' within 0.5 s" in row(table, "ranks", "failed")


def test_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    answers = run_world(2, examine_in_own_folder, tmp_path)
    table = answers[0][1]
    assert row(table, "shared folder", "failed").startswith("1 rank 0's file is not seen")
    assert row(table, "shared folder", "ok").startswith("0 ")
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[], []]


def examine_in_own_folder(parent: Path) -> tuple[int, str, str]:
    """On a rank: as `examine`, with a folder of its own in place of the shared one."""
    folder = parent / os.environ["RANK"]
    folder.mkdir()
    return examine(Options(shared_folder=folder))
