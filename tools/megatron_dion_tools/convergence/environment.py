"""What numbers depend on: revision, software, processor and data."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import megatron_dion
from megatron_dion.megatron.run_directory import git_revision

_ENDINGS = ("", ".bin", ".idx")
_HASHED_BYTES = 1 << 28  # of a file; more would take longer than a case


def describe(flags: Sequence[str]) -> Mapping[str, str | None]:
    """Describe this machine, and the data files that flags of pretrain_gpt.py name."""
    import torch

    data = hashlib.sha256()
    for file in (Path(value + ending) for value in flags for ending in _ENDINGS):
        if file.is_file():
            data.update(f"{file.stat().st_size} ".encode())
            with file.open("rb") as opened:
                data.update(opened.read(_HASHED_BYTES))
    return {
        "megatron_dion": megatron_dion.__version__,
        "revision": git_revision(Path(megatron_dion.__file__).parent),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "megatron-core", "numpy")},
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "data": data.hexdigest(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Linux has the name in a file only."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
