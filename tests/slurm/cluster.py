"""A Slurm cluster of two nodes on this machine, in a folder of its own."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from megatron_dion.platforms import free_port
from tests.project import ROOT

SCRIPTS = ROOT / "examples" / "slurm"
# Longer than anything takes here, also on a busy machine.
SECONDS = 120.0
_SECONDS_TO_START = 30.0
_POLL_SECONDS = 0.05

# As on a cluster with control groups, proctrack/pgid ends what a killed rank has started, and a
# signal reaches torchrun but not its ranks.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobRequeue=1
KillWait=2
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_GPUS = """
NodeName=node[1-2] Name=gpu File=/dev/null
NodeName=node[1-2] Name=gpu File=/dev/zero
"""


def reason_to_skip() -> str | None:
    """Installs what is missing; None if there is everything that a cluster needs."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    if shutil.which("slurmctld") and shutil.which("munged"):
        return None
    install = "apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge"
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(["sh", "-c", install], env=quiet, capture_output=True, text=True)
    return f"{install}: {done.stderr.strip()[-300:]}" if done.returncode else None


def wait_for[T](what: str, condition: Callable[[], T], seconds: float = SECONDS) -> T:
    """Polls until a condition holds, and returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(_POLL_SECONDS)
    return value


class Cluster:
    """munged, slurmctld and two slurmd.

    Their folder has configuration, state and logs; its path must be short, as it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._configure()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def run(self, *command: str | Path, **variables: str) -> str:
        """Runs one of Slurm's commands in the repository and returns what it prints."""
        done = self._call(*command, **variables)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _call(self, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self._environment, **variables}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    def submit(self, log: Path, *command: str | Path, **variables: str) -> "Job":
        """Calls sbatch."""
        number = self.run("sbatch", "--parsable", f"--output={log}", *command, **variables)
        return Job(self, int(number), log)

    def close(self) -> None:
        """Ends all jobs and daemons."""
        try:
            if len(self._daemons) == 4:
                self.run("scancel", "--user=root")
                wait_for("no job left", lambda: not self.run("squeue", "--noheader"))
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
                daemon.wait(SECONDS)

    def _configure(self) -> None:
        self.folder.chmod(0o755)  # munged insists
        port, *ports = (free_port() for _ in range(3))
        text = _CONFIGURATION.format(
            folder=self.folder, host=socket.gethostname(), port=port, ports=ports
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(_GPUS)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)

    def _start(self) -> None:
        socket_ = self.folder / "munge.socket"
        files = {"socket": socket_, "key-file": self.folder / "munge.key"}
        files |= {f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        flags = [f"--{flag}={path}" for flag, path in files.items()]
        self._daemon("munged", "munged", "--foreground", *flags)
        wait_for("munged's socket", socket_.exists, _SECONDS_TO_START)
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in ("node1", "node2"):
            self._daemon(node, "slurmd", "-D", "-N", node)
        nodes = ("sinfo", "--noheader", "--Node", "--format=%T")
        wait_for(
            "two idle nodes",
            lambda: self._call(*nodes).stdout.split() == ["idle", "idle"],
            _SECONDS_TO_START,
        )

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as log:
            daemon = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        self._daemons.append(daemon)


class Job:
    """A job that was submitted; its batch script prints into a log."""

    def __init__(self, cluster: Cluster, number: int, log: Path) -> None:
        self.number = number
        self._log = log
        self._cluster = cluster

    def state(self) -> str:
        facts = self._cluster.run("scontrol", "show", "job", str(self.number))
        found = re.search(r"JobState=(\S+)", facts)
        assert found, facts
        return found[1]

    def wait_for(self, state: str, seconds: float = SECONDS) -> None:
        """Waits for a state; that the job has ended in another is an error."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} - {state}

        def reached() -> bool:
            found = self.state()
            assert found not in ended, f"{found}, not {state}: {self.text()[-6000:]}"
            return found == state

        wait_for(f"job {self.number} {state}", reached, seconds)

    def signal(self, name: str) -> None:
        """Signals the ranks, as Slurm does before a job's end."""
        self._cluster.run("scancel", f"--signal={name}", str(self.number))

    def release(self) -> None:
        """Starts a job that was requeued; Slurm would wait for two minutes.

        Not at once: the credential of a job is revoked with what it was in the same second.
        """
        self.wait_for("PENDING")
        self._cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+2")

    def pid_of_rank(self, rank: int, local_rank: int, **variables: object) -> int:
        """The process that trains, with these variables, as soon as it is there."""
        variables |= {"SLURM_JOB_ID": self.number, "RANK": rank, "LOCAL_RANK": local_rank}
        wanted = {f"{name}={value}".encode() for name, value in variables.items()}
        return wait_for(f"rank {rank}", lambda: _find_process("pretrain_gpt.py", wanted))

    def text(self) -> str:
        return self._log.read_text()

    def said(self) -> list[str]:
        """What the script itself said, without what ranks print."""
        mark = "pretrain.sbatch: "
        return [line[len(mark) :] for line in self.text().splitlines() if line.startswith(mark)]


def _find_process(script: str, variables: set[bytes]) -> int | None:
    """The process that runs a Python script in an environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if words[1:2] == [script.encode()] and variables <= set(environment):
            return int(folder.name)
    return None
