"""The mathematics of Dion on tensors. Imports torch only; knows no processes and no Megatron."""

from megatron_dion.algorithm.config import DionConfig
from megatron_dion.algorithm.exchange import Exchange, Matrix, Steps
from megatron_dion.algorithm.orthonormalize import (
    RowSums,
    orthonormalize,
    orthonormalize_flops,
)
from megatron_dion.algorithm.products import matmul_precision
from megatron_dion.algorithm.step import (
    IN_FLIGHT,
    Block,
    copy_all,
    dion_step,
    interleave,
)

__all__ = [
    "IN_FLIGHT",
    "Block",
    "DionConfig",
    "Exchange",
    "Matrix",
    "RowSums",
    "Steps",
    "copy_all",
    "dion_step",
    "interleave",
    "matmul_precision",
    "orthonormalize",
    "orthonormalize_flops",
]
