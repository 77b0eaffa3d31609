"""Runs a function on every rank of a world of forked processes, and returns the results.

A fork shares what the parent has imported, so a world starts in milliseconds. Each rank has the
environment variables that torchrun would set. Ranks, and the processes that ranks fork, end with
their parent, however the parent ends.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch._dynamo  # The first torch.optim.Optimizer of a process imports these two, in seconds.
import torch.distributed as dist
import torch.distributed.tensor

from megatron_dion.platforms import free_port

_FORK = multiprocessing.get_context("fork")
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RankError(AssertionError):
    """A rank raised or died; the message has its traceback."""


def run_world(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a new world and return the results, by rank.

    Raises:
        RankError: A rank raised or died. The other ranks were ended.
    """
    port = str(free_port())
    ranks: list[BaseProcess] = []
    ends: list[Connection] = []
    try:
        for rank in range(size):
            # Made now, so that no other rank holds its end when this rank dies.
            parent_end, rank_end = _FORK.Pipe(duplex=False)
            of_rank = (environment_of(rank, size, port), rank_end, function, args)
            process = _FORK.Process(target=_run_rank, args=of_rank)
            ranks.append(process)  # before it starts, lest a signal come between
            start(process)
            rank_end.close()
            ends.append(parent_end)
        return _receive_results(ends)
    finally:
        for started in ranks:
            if started.pid is not None:
                end(started)


def gloo_world(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Do as `run_world` does, with an initialized gloo process group on every rank."""
    return run_world(size, _with_gloo, function, args)


def start(process: BaseProcess) -> None:
    """Start a process that calls `end_with_parent` first.

    Python drops what a signal raises in the hooks of a fork, so signals wait until it is over.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(process: BaseProcess) -> None:
    """End a rank and the helpers that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()  # The rank may not have made its own process group yet.
    process.join()


def end_with_parent() -> None:
    """Let the kernel kill this process, and all that it forks later, when its parent ends.

    A forked process that nobody tells of an interrupt of its parent would go on as an orphan. Call
    this function first in such a process. It has no effect where the system is not Linux.
    """
    os.register_at_fork(after_in_child=_ask_for_parent_death_signal)
    _ask_for_parent_death_signal()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # `start` blocked them.
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # It ended before the kernel was asked.
        os._exit(1)


def _ask_for_parent_death_signal() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def environment_of(rank: int, size: int, port: str) -> dict[str, str]:
    """Return the variables that torchrun would set for a rank on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _receive_results(ends: Sequence[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        failures = []
        missing = {end: rank for rank, end in enumerate(ends) if rank not in results}
        for end in wait(list(missing)):
            rank = missing[end]  # type: ignore[index]
            try:
                succeeded, value = pickle.loads(end.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                failures.append(f"rank {rank} died")
                continue
            if succeeded:
                results[rank] = value
            else:
                failures.append(f"rank {rank}:\n{value}")
        # All of them: the first may only have lost its connection to the rank that is to blame.
        if failures:
            raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(ends))]


def _run_rank(
    environment: dict[str, str], end: Connection, function: Callable[..., Any], args: Sequence[Any]
) -> None:
    end_with_parent()
    os.setpgrp()
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    # `end.send` would pass tensors as shared memory, which ends with this process.
    end.send_bytes(pickle.dumps(result))
    end.close()
    sys.stdout.flush()
    os._exit(0)  # The parent's threads and exit handlers do not exist in this process.


def _with_gloo(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    result = function(*args)
    dist.barrier()  # A rank that left earlier would break the connections of the others.
    dist.destroy_process_group()
    return result
