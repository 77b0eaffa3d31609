"""Checks of what the operating system gives a process."""

import resource
import shutil
from pathlib import Path

from megatron_dion_tools.doctor.findings import FAILED, OK, WARNING, Finding
from megatron_dion_tools.doctor.gpus import count_gpus

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")


def limits() -> Finding:
    """Sockets and files count as open files; network cards with RDMA need locked memory."""
    files, locked = (
        float("inf") if (soft := resource.getrlimit(kind)[0]) == resource.RLIM_INFINITY else soft
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
    )
    text = f"{files} open files, {locked / GIB:.3g} GiB of locked memory"
    if files < 8192:
        return Finding(WARNING, text, "ulimit -n 65536; docker run --ulimit nofile=65536")
    if locked < 8 * GIB and count_gpus():
        fix = "ulimit -l unlimited; docker run --ulimit memlock=-1; for slurmd LimitMEMLOCK"
        return Finding(WARNING, f"{text}: InfiniBand may fail to register its buffers", fix)
    return Finding(OK, text)


def shared_memory() -> Finding:
    """NCCL and the workers of data loaders pass buffers through shared memory."""
    total = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else 0
    text = f"{total / GIB:.3g} GiB in {SHARED_MEMORY}"
    if total < GIB:
        return Finding(WARNING, text, "docker run --ipc=host, or --shm-size=16g")
    return Finding(OK, text)


def write(file: Path) -> Finding:
    """Make the file in the shared folder that `read` looks for on all ranks."""
    file.touch()
    return Finding(OK, f"{file.parent} can be written to")


def read(file: Path) -> Finding:
    """Look for the file that rank 0 made in the shared folder."""
    if not file.exists():
        fix = "mount the same file system on every node, and into every container"
        return Finding(FAILED, f"rank 0's file is not seen in {file.parent}", fix)
    return Finding(OK, f"{file.parent} is the same folder on all ranks")
