"""What numbers depend on: revision, software, processor and data."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import megatron_dion
from megatron_dion.megatron.run_directory import git_revision

Environment = Mapping[str, str | None]

_ENDINGS = ("", ".bin", ".idx")
# Hashing larger files would take longer than a case; their sizes stand for them.
_HASHED_BYTES = 1 << 30


def describe(flags: Sequence[str]) -> Environment:
    """Describe this machine, and the data files that flags of pretrain_gpt.py name."""
    import torch

    return {
        "megatron_dion": megatron_dion.__version__,
        "revision": git_revision(Path(megatron_dion.__file__).parent),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")},
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "data": _hash_of(Path(value + ending) for value in flags for ending in _ENDINGS),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _hash_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in filter(Path.is_file, paths):
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        if size <= _HASHED_BYTES:
            digest.update(file.read_bytes())
    return digest.hexdigest()
