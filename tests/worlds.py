"""Worlds of ranks for tests, started once in a pytest process and used again.

    from tests.worlds import world

    results = world(4).run(function, *args)   # by rank; inside a gloo group of 4 ranks
    results = world(4).fork(function, *args)  # on 4 new processes, with torchrun's environment
    results = world(4).train(*flags)          # as `fork`: pretrain_gpt.py's main

`function` is a function of a module, with arguments and a result that pickle copies. `run` reuses
processes: gloo's groups and Megatron's parallel_state are made anew for each call and the random
seed is set, but what a function changes in modules stays. Functions that do so, and whole
trainings, belong into `fork`, which costs a few tens of milliseconds for each rank. Both raise
`RankError` with the tracebacks of all ranks that failed. A world of which a rank failed, died or
does not answer is ended; the next call starts another.

All ranks are forked by the host, a process that has installed the CPU platform (which changes torch
for the whole process) and imported Megatron. The host is started by the first call.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from megatron_dion.platforms.ports import free_port
from megatron_dion_tools.local.world import (
    RankError,
    end,
    environment_of,
    gloo_world,
    run_world,
)
from tests.project import ROOT

__all__ = ["RankError", "in_host", "world"]

Function = Callable[..., Any]
_FORK = multiprocessing.get_context("fork")
# A collective whose other ranks do not come fails after the first; a rank that computes for longer
# than the second counts as hung.
_COLLECTIVE_SECONDS = 60
_CALL_SECONDS = 300


class World:
    """The ranks of one size. Get it from `world`.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def run(self, function: Function, *args: Any) -> list[Any]:
        """Call a function on every rank, in processes that other calls have used."""
        results: list[Any] = in_host(_run_on_reused_ranks, self._size, function, args)
        return results

    def fork(self, function: Function, *args: Any) -> list[Any]:
        """Call a function on every rank, in new processes; it makes the process group itself."""
        results: list[Any] = in_host(run_world, self._size, function, *args)
        return results

    def fork_in_group(self, function: Function, *args: Any) -> list[Any]:
        """As `fork`, inside a gloo group."""
        results: list[Any] = in_host(gloo_world, self._size, function, *args)
        return results

    def train(self, *flags: str) -> None:
        """Train as pretrain_gpt.py does with these flags."""
        self.fork(_train, flags)


@cache
def world(size: int) -> World:
    """The world of `size` ranks."""
    return World(size)


def in_host(function: Function, *args: Any) -> Any:
    """Call a function in the process that forks the ranks; what it changes, new ranks inherit.

    Raises:
        RankError: the function raised; carries its message.
    """
    return _host().call(function, args)


# --- in the process of the tests --------------------------------------------------------------


class _Host:
    """The process that forks the ranks, as seen by the process of the tests.

    It ends when its pipe closes; amid a call, the guardian of the tests ends it and the ranks.
    """

    def __init__(self) -> None:
        self._end, other_end = multiprocessing.Pipe()
        code = "import sys; from tests.worlds import _serve; _serve(int(sys.argv[1]))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(other_end.fileno())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[other_end.fileno()],
            start_new_session=True,  # Ctrl-C is for pytest alone
        )
        other_end.close()

    def call(self, function: Function, args: Sequence[Any]) -> Any:
        self._end.send_bytes(pickle.dumps((function, args)))
        try:
            succeeded, value = pickle.loads(self._end.recv_bytes())
        except EOFError:
            _host.cache_clear()
            raise RankError(f"the host of the ranks died: code {self._process.wait()}") from None
        if not succeeded:
            raise RankError(value)
        return value


@cache
def _host() -> _Host:
    return _Host()


# --- in the host ------------------------------------------------------------------------------


def _serve(file_descriptor: int) -> None:
    """Call what the process of the tests asks for, until that process closes its end."""
    from megatron_dion_tools.local.preload import preload

    preload()
    _shuffle_mock_documents()
    end = Connection(file_descriptor)
    while (request := _received(end)) is not None:
        try:
            function, args = pickle.loads(request)
            answer = pickle.dumps((True, function(*args)))
        except RankError as error:
            answer = pickle.dumps((False, str(error)))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        end.send_bytes(answer)
    for ranks in _reused_ranks.values():
        ranks.end()


def _shuffle_mock_documents() -> None:
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 1000  # documents


def _received(end: Connection) -> bytes | None:
    try:
        return end.recv_bytes()
    except EOFError:
        return None


class _ReusedRanks:
    """Processes that answer one call after another."""

    def __init__(self, size: int) -> None:
        port = str(free_port())
        self._ends: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(size):
            mine, theirs = _FORK.Pipe()
            environment = environment_of(rank, size, port)
            process = _FORK.Process(target=_serve_rank, args=(environment, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)

    def call(self, function: Function, args: Sequence[Any]) -> list[Any]:
        request = pickle.dumps((function, args))
        for pipe in self._ends:
            pipe.send_bytes(request)
        results: dict[int, Any] = {}
        while len(results) < len(self._ends):
            missing = [rank for rank in range(len(self._ends)) if rank not in results]
            ready = wait([self._ends[rank] for rank in missing], _CALL_SECONDS)
            if not ready:
                raise RankError(f"ranks {missing} did not answer within {_CALL_SECONDS} s")
            failures = []
            for rank in (rank for rank in missing if self._ends[rank] in ready):
                succeeded, value = self._answer(rank)
                if succeeded:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}:\n{value}")
            # All at hand: the first may only have lost its connection to the one that went wrong.
            if failures:
                raise RankError("\n".join(failures))
        return [results[rank] for rank in range(len(self._ends))]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = pickle.loads(self._ends[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            return False, "died"
        return answer

    def end(self) -> None:
        for process in self._processes:
            end(process)


_reused_ranks: dict[int, _ReusedRanks] = {}


def _run_on_reused_ranks(size: int, function: Function, args: Sequence[Any]) -> list[Any]:
    if size not in _reused_ranks:
        _reused_ranks[size] = _ReusedRanks(size)
    try:
        return _reused_ranks[size].call(function, args)
    except BaseException:
        _reused_ranks.pop(size).end()
        raise


# --- on a rank --------------------------------------------------------------------------------


def _serve_rank(environment: dict[str, str], end: Connection) -> None:
    os.setpgrp()  # so that `end` ends the processes that a function may have started, too
    os.environ |= environment
    torch.set_num_threads(1)
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    seconds = timedelta(seconds=_COLLECTIVE_SECONDS)
    store = dist.TCPStore(
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), size, rank == 0, seconds
    )
    call = 0
    while (request := _received(end)) is not None:
        call += 1
        try:
            function, args = pickle.loads(request)
            of_call = dist.PrefixStore(str(call), store)
            dist.init_process_group(
                "gloo", store=of_call, rank=rank, world_size=size, timeout=seconds
            )
            torch.manual_seed(0)
            answer = pickle.dumps((True, function(*args)))
            _leave_groups()
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        sys.stdout.flush()
        end.send_bytes(answer)
    os._exit(0)  # the exit handlers of the host are not this process's


def _leave_groups() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.barrier()  # a rank that left earlier would break the connections of the others
        dist.destroy_process_group()


def _train(flags: Sequence[str]) -> None:
    from megatron_dion.megatron.launch import train

    train(flags)
