"""Runs a function in a world of forked processes and brings their results back.

Forking shares what the parent has imported, so a world starts in milliseconds. Every process is a
rank with the environment that torchrun would set.
"""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch._dynamo  # the first torch.optim.Optimizer of a process imports these two, in seconds
import torch.distributed as dist
import torch.distributed.tensor

from megatron_dion.platforms.ports import free_port

_FORK = multiprocessing.get_context("fork")


class RankError(AssertionError):
    """A rank of the world failed; carries its traceback."""


def run_world(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `function(*args)` on every rank of a world and returns the results by rank.

    Raises:
        RankError: a rank raised or died; the others are ended first.
    """
    port = str(free_port())
    ends = [_FORK.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        _FORK.Process(target=_run_rank, args=(rank, size, port, ends[rank][1], function, args))
        for rank in range(size)
    ]
    for process, (_, child_end) in zip(ranks, ends, strict=True):
        process.start()
        child_end.close()
    try:
        return _collect([parent_end for parent_end, _ in ends])
    finally:
        for process in ranks:
            end(process)


def end(process: BaseProcess) -> None:
    """Ends a rank, and the helpers that it has started, which would outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()  # it may not have come to make a group of its own
    process.join()


def gloo_world(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """As `run_world`, inside an initialized gloo process group."""
    return run_world(size, _with_gloo, function, args)


def _collect(ends: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        failed = []
        for end in wait([end for rank, end in enumerate(ends) if rank not in results]):
            rank = ends.index(end)  # type: ignore[arg-type]
            try:
                message = end.recv_bytes()  # type: ignore[union-attr]
            except EOFError:
                failed.append(f"rank {rank} died")
                continue
            ok, value = torch.load(io.BytesIO(message), weights_only=False)
            if ok:
                results[rank] = value
            else:
                failed.append(f"rank {rank}:\n{value}")
        # All so far: the first may only have lost its connection to the one that went wrong.
        if failed:
            raise RankError("\n".join(failed))
    return [results[rank] for rank in range(len(ends))]


def _run_rank(
    rank: int,
    size: int,
    port: str,
    end: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.setpgrp()
    os.environ |= environment_of(rank, size, port)
    torch.set_num_threads(1)
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    # Not `send`: it passes tensors as shared memory, which is gone with this process.
    buffer = io.BytesIO()
    torch.save(result, buffer)
    end.send_bytes(buffer.getvalue())
    end.close()
    sys.stdout.flush()
    os._exit(0)  # the parent's threads and exit handlers are not this process's


def environment_of(rank: int, size: int, port: str) -> dict[str, str]:
    """What torchrun would set for a rank on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _with_gloo(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
