"""What torch does to many tensors in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensor by tensor; there may be none."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
