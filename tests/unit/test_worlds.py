"""The worlds in which the other tests run, and what is left of them after an interrupt."""

import os
import select
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.project import ROOT
from tests.worlds import RankError, world

_INTERRUPTED = """
import os, subprocess
from tests.worlds import world

def wait(pipe):
    helper = subprocess.Popen(["sleep", "1000"])
    with open(pipe, "a") as file:
        file.write(f"{os.getpid()} {helper.pid} ")
    helper.wait()

def test_waits(request):
    world(2).run(wait, request.config.rootpath / "pipe")
"""


def fail(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("not today")
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "message"),
    [("raises", "rank 1:\n(.*\n)*ValueError: not today"), ("dies", "rank 1 died")],
)
def test_a_failure_of_a_rank_is_told(how: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        world(2).run(fail, how)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    test = tmp_path / "test_interrupted.py"
    test.write_text(_INTERRUPTED)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--rootdir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}:{tmp_path}"}
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell may ignore it
    pytest_process = subprocess.Popen(
        [*command, str(test)], cwd=tmp_path, env=environment, preexec_fn=heeded
    )
    processes: list[int] = []
    with open(os.open(pipe, os.O_RDWR), "rb", buffering=0) as written:
        while len(processes) < 4:
            ready, _, _ = select.select([written, os.pidfd_open(pytest_process.pid)], [], [])
            assert ready == [written], "pytest ended before it was interrupted"
            processes += map(int, written.read(1000).split())
    ends = [os.pidfd_open(process) for process in processes]
    pytest_process.send_signal(number)
    assert pytest_process.wait(60) != 0
    while ends:
        ended, _, _ = select.select(ends, [], [], 60)
        assert ended, f"{len(ends)} of the processes {processes} go on"
        ends = [end for end in ends if end not in ended]
