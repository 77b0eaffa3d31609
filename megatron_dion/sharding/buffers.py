"""Flat tensors that have memory only while a step needs them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Buffers:
    """1-D tensors that get and lose their memory together.

    Their storages are resized, so views of the tensors, of which there may be thousands, are made
    once and stay valid. The contents are lost with the memory.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, when they have memory."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """One more tensor, with memory until `free`; views can be made only while it has any."""
        tensor = torch.empty(numel, dtype=dtype, device=self._device)
        self._tensors.append(tensor)
        return tensor

    def allocate(self) -> None:
        """Gives every tensor memory with undefined contents."""
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(tensor.nbytes)

    def free(self) -> None:
        """Gives the memory back; there may be none."""
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)

    @contextmanager
    def allocated(self) -> Iterator[None]:
        """Memory for the time of a with statement."""
        self.allocate()
        try:
            yield
        finally:
            self.free()
