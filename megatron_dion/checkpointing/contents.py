"""Reads what a checkpoint of Megatron's format `torch_dist` holds, without a run around it."""

import warnings
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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_dion.checkpointing.errors import CheckpointError, in_one_line


@dataclass(frozen=True)
class Contents:
    """A complete checkpoint in a folder. What cannot be read of it raises CheckpointError."""

    folder: Path

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all ranks share, such as iteration, arguments, scheduler, the optimizer's record."""
        from megatron.core.dist_checkpointing import load_common_state_dict

        with _explained(f"the common state in {self.folder} cannot be read"):
            return load_common_state_dict(self.folder)

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """All tensors by key."""
        with _explained(f"{self.folder}/.metadata is missing or damaged"):
            index = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        return {key: one for key, one in index.items() if isinstance(one, TensorStorageMetadata)}

    def read(self, *keys: str) -> dict[str, Tensor]:
        """Whole tensors by key, on CPU."""
        wanted = {key: self.tensors[key] for key in keys}
        state = {k: torch.empty(one.size, dtype=one.properties.dtype) for k, one in wanted.items()}
        with _explained(f"{', '.join(keys[:3])} cannot be read"):
            load(state, storage_reader=FileSystemReader(self.folder), no_dist=True)
        return state


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Turns whatever damaged bytes make a reader raise into one line."""
    # CheckpointException is no Exception.
    explained = in_one_line(CheckpointError, problem, Exception, CheckpointException)
    with explained, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
