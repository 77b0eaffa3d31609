"""The doctor on worlds of gloo ranks, some of them ill."""

import contextlib
import io
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dion_tools import cli
from megatron_dion_tools.doctor import examination
from megatron_dion_tools.doctor.checks import Check, Finding
from megatron_dion_tools.doctor.mailbox import Mailbox
from megatron_dion_tools.local.world import run_world

Illness = Callable[[], None]


def examine(flags: str, illness: Illness | None = None) -> tuple[int, str, str]:
    """On a rank: the exit code of the doctor, what it says on stdout and on stderr."""
    if illness is not None:
        illness()
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()) as complained,
    ):
        code = examination.run(cli.parse(["doctor", *flags.split()]), os.environ)
    return code, said.getvalue(), complained.getvalue()


def examine_unless(rank: int, flags: str, illness: Illness | None = None) -> tuple[int, str, str]:
    """On a rank: as `examine`, but one rank never comes."""
    return (0, "", "") if os.environ["RANK"] == str(rank) else examine(flags, illness)


def on(rank: int, change: Illness) -> Illness:
    return lambda: change() if os.environ["RANK"] == str(rank) else None


def row(table: str, check: str, verdict: str) -> str:
    """What follows the name of a check and this verdict, on the one line that begins with them."""
    lines = [line for line in table.splitlines() if line.startswith(f"{check} ")]
    cells = [line.removeprefix(f"{check} ").split(maxsplit=1) for line in lines]
    [rest] = [rest for found, rest in cells if found == verdict]
    return rest


@pytest.mark.parametrize("size", [1, 2, 3])
def test_healthy_world(size: int) -> None:
    answers = run_world(size, examine, "")
    assert [code for code, _, _ in answers] == [0] * size, answers
    table = answers[0][1]
    assert all(said == "" for _, said, _ in answers[1:])
    assert all(complained == "" for _, _, complained in answers)
    ranks = {1: "0", 2: "0-1", 3: "0-2"}[size]
    for check in ("all_reduce", "messages", "packages"):
        assert row(table, check, "ok").startswith(f"{ranks} "), table


def wrong_sum() -> None:
    right = dist.all_reduce

    def wrong(tensor: torch.Tensor, *args: Any) -> None:
        right(tensor, *args)
        tensor[5] += 1

    dist.all_reduce = wrong


def wrong_message_to_rank_0() -> None:
    right = dist.all_to_all_single

    def wrong(received: torch.Tensor, sent: torch.Tensor) -> None:
        sent[7] ^= 4
        right(received, sent)

    dist.all_to_all_single = wrong


def test_rank_with_a_wrong_sum_is_named() -> None:
    answers = run_world(3, examine, "", on(1, wrong_sum))
    assert [code for code, _, _ in answers] == [1, 1, 1]
    table = answers[0][1]
    failed = row(table, "all_reduce", "failed")
    assert (failed[0], failed[1:].strip()) == ("1", "1 of 4096 sums are wrong here")
    assert row(table, "all_reduce", "ok").startswith("0, 2 ")
    assert row(table, "messages", "ok").startswith("0-2 ")
    assert "failed: all_reduce" in table.splitlines()[-1]


def test_rank_that_sends_wrong_messages_is_named() -> None:
    table = run_world(3, examine, "", on(1, wrong_message_to_rank_0))[0][1]
    failed = row(table, "messages", "failed")
    assert failed.startswith("0 ")
    assert failed.endswith("messages from rank 1 arrive corrupted")
    assert row(table, "messages", "ok").startswith("1-2 ")


def give_up_soon_on(check: str) -> None:
    """Leaves all other checks the time that a busy machine may need."""
    right = examination.examine

    def examine_briefly(checks: dict[str, Check], seconds: float) -> dict[str, Finding]:
        return right(checks, 0.5 if check in checks else seconds)

    examination.examine = examine_briefly  # type: ignore[assignment]


def wait_for_rank_1_only() -> None:
    """Lets the process group fail soon, and rank 0 not wait for others once rank 1 has reported."""
    give_up_soon_on("process group")
    right = Mailbox.collect

    def collect(self: Mailbox, key: str, words: str) -> dict[int, str]:
        if self.rank == 0:
            self._store.wait([f"{key}/1"], timedelta(seconds=60))
            self.seconds = 0.5
        return right(self, key, words)

    Mailbox.collect = collect  # type: ignore[method-assign]


def test_rank_that_never_comes_is_named() -> None:
    answers = run_world(3, examine_unless, 2, "", wait_for_rank_1_only)
    assert [code for code, _, _ in answers[:2]] == [1, 1]
    table = answers[0][1]
    assert "rank 2 sent no report within 0.5 s" in row(table, "ranks", "failed")
    assert row(table, "packages", "ok").startswith("0-1 ")
    assert row(table, "process group", "failed").startswith("0-1 ")
    assert "\nall_reduce " not in table


def test_rank_zero_that_never_comes_is_named() -> None:
    [_, (code, said, complained)] = run_world(2, examine_unless, 0, "--timeout 0.5")
    assert (code, said) == (1, "")
    assert "rank 1: no rank 0 at 127.0.0.1" in complained


def hang() -> None:
    """Lets the sum of rank 1 never begin; that of other ranks never ends then."""
    give_up_soon_on("all_reduce")
    on(1, lambda: setattr(dist, "all_reduce", lambda *args: threading.Event().wait()))()


def test_collective_that_hangs_has_an_end() -> None:
    answers = run_world(2, examine, "", hang)
    assert [code for code, _, _ in answers] == [1, 1]
    table = answers[0][1]
    assert row(table, "all_reduce", "failed").endswith("no end within 0.5 s")
    assert "\nmessages" not in table
