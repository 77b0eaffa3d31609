"""The precision of float32 products, by torch's own switches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What torch's per-backend switches call the precisions of `torch.set_float32_matmul_precision`.
_CUDA = {"highest": "ieee", "high": "tf32", "medium": "tf32"}
_CPU = {"highest": "ieee", "high": "ieee", "medium": "bf16"}


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets the precision of float32 products for the time of a with statement.

    Args:
        precision: `highest` is float32; `high` lets a GPU round operands to TF32 (10 bits);
            `medium` also lets a CPU round them to bf16 (7 bits), where it has instructions for it.
    """
    backends: list[tuple[Any, str]] = [
        (torch.backends.cuda.matmul, _CUDA[precision]),
        (getattr(torch.backends.mkldnn, "matmul", None), _CPU[precision]),
    ]
    if not all(hasattr(backend, "fp32_precision") for backend, _ in backends):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    saved = [backend.fp32_precision for backend, _ in backends]
    for backend, value in backends:
        backend.fp32_precision = value
    try:
        yield
    finally:
        for (backend, _), value in zip(backends, saved, strict=True):
            backend.fp32_precision = value
