"""What numbers depend on besides the code: software, processor, data."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import megatron_dion
from megatron_dion.megatron.run_directory import git_revision
from megatron_dion_tools.local.flags import effective

Environment = Mapping[str, str | None]

# Larger data is known by its index and its size: hashing it would take longer than the case.
_HASHED_BYTES = 1 << 30

# Where these differ, the last bits of a sum may differ. The revision is not among them: whether
# the code changed a number is what is being asked.
_ARITHMETIC = ("torch", "megatron-core", "numpy", "processor", "instructions")
_DATA = ("tokenizer", "data")
_DATA_FLAGS = ("--train-data-path", "--data-path")


def describe(flags: Sequence[str]) -> Environment:
    """Describe this machine and the data that the flags name.

    Args:
        flags: of pretrain_gpt.py.
    """
    import torch

    versions = {name: importlib.metadata.version(name) for name in _ARITHMETIC[:3]}
    return {
        "megatron_dion": megatron_dion.__version__,
        "revision": git_revision(Path(megatron_dion.__file__).parent),
        "python": platform.python_version(),
        **versions,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "tokenizer": _hash_of(effective(flags), ("--tokenizer-model",), ("",)),
        "data": _hash_of(effective(flags), _DATA_FLAGS, (".bin", ".idx")),
    }


def same_arithmetic(one: Environment, other: Environment) -> bool:
    """Whether the same code must give the same bits in both."""
    return not _different(one, other, _ARITHMETIC)


def different_data(one: Environment, other: Environment) -> list[str]:
    """What of the data differs; with it, curves cannot be compared."""
    return _different(one, other, _DATA)


def difference(one: Environment, other: Environment) -> str:
    """What differs in the arithmetic, in words."""
    names = _different(one, other, _ARITHMETIC)
    return ", ".join(f"{name} {one.get(name)} is {other.get(name)} here" for name in names)


def _different(one: Environment, other: Environment, names: Sequence[str]) -> list[str]:
    return [name for name in names if one.get(name) != other.get(name)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _hash_of(flags: Sequence[str], names: Sequence[str], endings: Sequence[str]) -> str | None:
    """Of all files that the flags name; a blend's weights are no files."""
    digest, found = hashlib.sha256(), False
    for file in (Path(value + ending) for value in _values(flags, names) for ending in endings):
        if file.is_file():
            found = True
            size = file.stat().st_size
            digest.update(f"{size} ".encode())
            if size <= _HASHED_BYTES:
                digest.update(file.read_bytes())
    return digest.hexdigest() if found else None


def _values(flags: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """The values of the named flags, written as `--flag value ...` or `--flag=value`."""
    named = False
    for part in flags:
        if part.startswith("--"):
            flag, _, value = part.partition("=")
            named = flag in names
            if named and value:
                yield value
        elif named:
            yield part
