"""Reads the YAML files of cases and studies into dataclasses, whose fields are the keys."""

import dataclasses
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml

from megatron_dion_tools.data.prepared import Data, data_flags, prepare
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.flags import read_flags

Flags = Annotated[tuple[str, ...], "one string"]
"""Flags of pretrain_gpt.py, which a YAML file writes as one string."""


@dataclass(frozen=True, kw_only=True)
class TrainingFile:
    """What the files of cases and studies have in common.

    Attributes:
        path: The file itself.
        arguments: An `.args` file beside it, with flags of all runs.
        flags: More flags of all runs.
        vocab_size: Vocabulary of the project's corpus to train on; None where flags name the data.
        seeds: Seeds to train with.
    """

    path: Path
    arguments: str
    seeds: tuple[int, ...]
    flags: Flags = ()
    vocab_size: int | None = None

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.path.stem

    @property
    def common_flags(self) -> tuple[str, ...]:
        """The flags of all runs, except those of the data."""
        return (*read_flags(self.path.parent / self.arguments), *self.flags)

    def prepare_data(self) -> tuple[str, ...]:
        """Prepare the project's corpus if it is asked for, and return the flags that name it."""
        if self.vocab_size is None:
            return ()
        data = Data(Path("data", f"vocab-{self.vocab_size}"), self.vocab_size)
        prepare(data)
        return tuple(data_flags(data))


def read_training_file[T: TrainingFile](path: Path, kind: type[T]) -> T:
    """Read a case or a study, that is, a YAML file with the fields of `kind` for keys.

    Raises:
        ToolError: The file is not as `kind` asks; the message names the file, key and value.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        result: T = _parse_fields(kind, content, "the file", path=path)
        read_flags(path.parent / result.arguments)
    except OSError as error:
        raise ToolError(f"{path}: cannot read {error.filename} ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ToolError(f"{path}: {' '.join(str(error).split())}") from error
    return result


def _parse_fields(kind: Any, content: Any, where: str, **given: Any) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r} and not a mapping")
    hints = get_type_hints(kind, include_extras=True)
    keys = {field.name: field for field in dataclasses.fields(kind) if field.name not in given}
    if unknown := [key for key in content if key not in keys]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r} (there are {', '.join(keys)})")
    for name, field in keys.items():
        is_needed = field.default is field.default_factory is dataclasses.MISSING
        if is_needed and name not in content:
            raise ValueError(f"{where}: no key {name!r}")
    values = {key: _parse(hints[key], value, f"{where}: {key}") for key, value in content.items()}
    return kind(**values, **given)


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Check a value against a type and convert it; whole numbers must be positive."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:  # T | None
        return _parse(parts[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _parse_fields(kind, value, where)
    if origin is Mapping and isinstance(value, dict) and value:
        return {str(key): _parse(parts[1], v, f"{where}: {key}") for key, v in value.items()}
    if origin is Annotated and isinstance(value, str):  # Flags
        return tuple(shlex.split(value))
    if origin is tuple and isinstance(value, list) and value:
        return tuple(_parse(parts[0], item, where) for item in value)
    if kind is float and type(value) in (int, float) and 0 <= value < math.inf:
        return float(value)
    if type(value) is kind and (kind is not int or value > 0):
        return value
    raise ValueError(f"{where} cannot be {value!r}")
