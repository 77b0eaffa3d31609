"""Reads what a checkpoint of Megatron's format `torch_dist` holds, without a run around it."""

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_dion.checkpointing.errors import CheckpointError, one_line
from megatron_dion.checkpointing.folders import MARKER

_BACKEND, _BACKEND_VERSION = "torch_dist", 1


@dataclass(frozen=True)
class Contents:
    """A complete checkpoint. What cannot be read of it raises CheckpointError.

    Attributes:
        folder: where it is.
    """

    folder: Path

    @cached_property
    def metadata(self) -> Metadata:
        """The index of all tensors and objects."""
        self._check_format()
        with _explained(f"{self.folder}/.metadata is missing or damaged"):
            return FileSystemReader(self.folder).read_metadata()

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all ranks share, such as iteration, arguments, scheduler, the optimizer's record."""
        from megatron.core.dist_checkpointing import load_common_state_dict

        self._check_format()
        with _explained(f"the common state in {self.folder} cannot be read"):
            return load_common_state_dict(self.folder)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """All tensors by key."""
        entries = self.metadata.state_dict_metadata.items()
        return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def read(self, key: str) -> Tensor:
        """A whole tensor, on CPU."""
        entry = self.tensors[key]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with _explained(f"{key} cannot be read"):
            load({key: tensor}, storage_reader=FileSystemReader(self.folder), no_dist=True)
        return tensor

    def damaged_files(self) -> list[str]:
        """Describes each file that is missing or shorter than the index says."""
        sizes: dict[str, int] = defaultdict(int)
        for item in self.metadata.storage_data.values():
            sizes[item.relative_path] = max(sizes[item.relative_path], item.offset + item.length)
        damaged = []
        for name, size in sorted(sizes.items()):
            path = self.folder / name
            if not path.is_file():
                damaged.append(f"{name} is missing")
            elif path.stat().st_size < size:
                damaged.append(f"{name} has {path.stat().st_size} bytes of at least {size}")
        return damaged

    def gaps(self) -> list[str]:
        """Describes each tensor whose pieces do not tile it."""
        sizes = {
            key: (sum(chunk.sizes.numel() for chunk in entry.chunks), entry.size.numel())
            for key, entry in self.tensors.items()
        }
        return [f"{k} has {n} of {whole} elements" for k, (n, whole) in sizes.items() if n != whole]

    def _check_format(self) -> None:
        with _explained(f"{self.folder / MARKER} is missing or damaged"):
            values = json.loads((self.folder / MARKER).read_text())
            backend, version = values["sharded_backend"], values["sharded_backend_version"]
        if backend != _BACKEND:
            raise CheckpointError(f"{self.folder} has the format {backend}, not {_BACKEND}")
        if version > _BACKEND_VERSION:
            raise CheckpointError(
                f"{self.folder} has version {version} of the format {_BACKEND}, and this"
                f" megatron-core knows versions up to {_BACKEND_VERSION}: install a newer one"
            )


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Turns whatever damaged bytes make a reader raise into one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise CheckpointError(f"{problem} ({one_line(error)})") from error
