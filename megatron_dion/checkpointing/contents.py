"""Reads what a checkpoint of Megatron's `torch_dist` format holds, without a run around it."""

import json
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_dion.checkpointing.errors import CheckpointError
from megatron_dion.checkpointing.folders import MARKER

_BACKEND, _BACKEND_VERSION = "torch_dist", 1


@dataclass(frozen=True)
class Contents:
    """A checkpoint that is complete.

    Attributes:
        folder: where it is.
    """

    folder: Path

    @cached_property
    def metadata(self) -> Metadata:
        """The index of all tensors and objects.

        Raises:
            CheckpointError: it cannot be read, or is of a later version of the format.
        """
        self._check_format()
        try:
            found = FileSystemReader(self.folder).read_metadata()
        except Exception as error:  # unpickling damaged bytes raises anything
            raise CheckpointError(
                f"{self.folder}/.metadata is missing or damaged ({_line(error)})"
            ) from error
        if not isinstance(found, Metadata) or found.storage_data is None:
            raise CheckpointError(f"{self.folder}/.metadata is not an index of tensors")
        return found

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all ranks share: iteration, arguments, the scheduler, the optimizer's record.

        Raises:
            CheckpointError: it cannot be read.
        """
        from megatron.core.dist_checkpointing import load_common_state_dict

        self._check_format()
        try:
            return load_common_state_dict(self.folder)
        except Exception as error:
            raise CheckpointError(
                f"the common state in {self.folder} cannot be read ({_line(error)})"
            ) from error

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """All tensors by key."""
        entries = self.metadata.state_dict_metadata.items()
        return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def read(self, key: str) -> Tensor:
        """A whole tensor, on CPU.

        Raises:
            CheckpointError: it cannot be read.
        """
        entry = self.tensors[key]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load({key: tensor}, storage_reader=FileSystemReader(self.folder), no_dist=True)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise CheckpointError(f"{key} cannot be read ({_line(error)})") from error
        return tensor

    def damaged_files(self) -> list[str]:
        """Describes each file that is missing or shorter than the index says."""
        sizes: dict[str, int] = defaultdict(int)
        for item in self.metadata.storage_data.values():
            end = item.offset + item.length
            sizes[item.relative_path] = max(sizes[item.relative_path], end)
        found = []
        for name, size in sorted(sizes.items()):
            path = self.folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size < size:
                found.append(f"{name} has {path.stat().st_size} bytes of at least {size}")
        return found

    def gaps(self) -> list[str]:
        """Describes each tensor whose pieces do not tile it."""
        found = []
        for key, entry in self.tensors.items():
            held = sum(chunk.sizes.numel() for chunk in entry.chunks)
            if held != entry.size.numel():
                found.append(f"{key} has {held} of {entry.size.numel()} elements")
        return found

    def _check_format(self) -> None:
        try:
            values = json.loads((self.folder / MARKER).read_text())
            backend, version = values["sharded_backend"], values["sharded_backend_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / MARKER} is missing or damaged ({_line(error)})"
            ) from error
        if backend != _BACKEND:
            raise CheckpointError(f"{self.folder} has the format {backend}, not {_BACKEND}")
        if version > _BACKEND_VERSION:
            raise CheckpointError(
                f"{self.folder} has version {version} of the format {_BACKEND}, and this"
                f" megatron-core knows versions up to {_BACKEND_VERSION}: install a newer one"
            )


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:300]}" if text else name
