"""Checks of what the operating system gives a process."""

import resource
import shutil
import tempfile
from pathlib import Path

from megatron_dion_tools.doctor.findings import Finding, failed, ok, warning

GIB = 2**30
ENOUGH_FILES = 8192
ENOUGH_LOCKED = 8 * GIB
ENOUGH_SHARED = GIB
ENOUGH_DISK = 20 * GIB
LEAST_DISK = GIB

SHARED_MEMORY = Path("/dev/shm")


def open_files(limit: int | None = None) -> Finding:
    """Sockets to other ranks, checkpoint files and data sets all count."""
    if limit is None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _is_enough(limit, ENOUGH_FILES):
        return ok(_unless_unlimited(limit, str(limit)))
    return warning(f"{limit}", "ulimit -n 65536; docker run --ulimit nofile=65536")


def locked_memory(gpus: int, limit: int | None = None) -> Finding:
    """Network cards with RDMA want buffers that stay where they are."""
    if limit is None:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = _unless_unlimited(limit, size(limit))
    if _is_enough(limit, ENOUGH_LOCKED):
        return ok(text)
    if not gpus:
        return ok(f"{text}, enough on CPU")
    return warning(
        f"{text}: InfiniBand may fail to register its buffers",
        "ulimit -l unlimited; docker run --ulimit memlock=-1; LimitMEMLOCK=infinity for slurmd",
    )


def shared_memory(folder: Path = SHARED_MEMORY, total: int | None = None) -> Finding:
    """NCCL and the workers of data loaders pass buffers through it."""
    if not folder.is_dir():
        return warning(f"there is no {folder}", "mount a tmpfs there")
    if total is None:
        total = shutil.disk_usage(folder).total
    if total < ENOUGH_SHARED:
        return warning(size(total), "docker run --ipc=host, or --shm-size=16g")
    return ok(size(total))


def disk(folder: Path, free: int | None = None) -> Finding:
    """Checkpoints and logs go to the run folder."""
    try:
        with tempfile.TemporaryFile(dir=_nearest_folder(folder)):
            pass
    except OSError as error:
        return failed(f"{folder}: {error.strerror}", "name a folder that this user may write to")
    if free is None:
        free = shutil.disk_usage(_nearest_folder(folder)).free
    text = f"{size(free)} free for {folder}"
    if free < LEAST_DISK:
        return failed(text, "free some space, or use another --run-dir")
    if free < ENOUGH_DISK:
        return warning(text, "a few checkpoints will fill it: free some, or use another --run-dir")
    return ok(text)


def size(count: float) -> str:
    """Say a number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _nearest_folder(path: Path) -> Path:
    """A run folder is made by the run; what counts before that is where it will be made."""
    return next(one for one in (path, *path.absolute().parents) if one.is_dir())


def _is_enough(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def _unless_unlimited(limit: int, text: str) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else text
