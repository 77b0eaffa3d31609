"""Worlds of ranks for tests, forked from one process that has Megatron in memory.

    from tests.worlds import world

    results = world(4).run(function, *args)   # by rank; inside a gloo group of 4 ranks
    results = world(4).fork(function, *args)  # the same without a group
    results = world(4).train(*flags)          # pretrain_gpt.py's main

`function` is a function of a module, with arguments and a result that pickle copies. Each call has
new processes, with torchrun's environment, at a few tens of milliseconds for each rank; what a
function changes in modules ends with them. All raise `RankError` with the tracebacks of all ranks
that failed.

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
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from megatron_dion_tools.local.runs import train
from megatron_dion_tools.local.world import RankError, gloo_world, run_world
from tests.project import ROOT

__all__ = ["RankError", "in_host", "train", "world"]

Function = Callable[..., Any]


class World(NamedTuple):
    """Ranks of which there are `size`. Get it from `world`."""

    size: int

    def run(self, function: Function, *args: Any) -> list[Any]:
        """Call a function on every rank, inside a gloo group."""
        results: list[Any] = in_host(gloo_world, self.size, function, *args)
        return results

    def fork(self, function: Function, *args: Any) -> list[Any]:
        """Call a function on every rank; it makes the process group itself."""
        results: list[Any] = in_host(run_world, self.size, function, *args)
        return results

    def train(self, *flags: str) -> None:
        """Train as pretrain_gpt.py does with these flags."""
        self.fork(train, flags)


def world(size: int) -> World:
    """The world of `size` ranks."""
    return World(size)


def in_host(function: Function, *args: Any) -> Any:
    """Call a function in the process that forks the ranks; what it changes, new ranks inherit.

    Raises:
        RankError: the function raised; carries its message.
    """
    return _host().call(function, args)


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


def _serve(file_descriptor: int) -> None:
    """In the host: call what the process of the tests asks for, until that closes its end."""
    from megatron_dion_tools.local.preload import preload

    preload()
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 1000  # documents; shuffling more takes every rank a while
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


def _received(end: Connection) -> bytes | None:
    try:
        return end.recv_bytes()
    except EOFError:
        return None
