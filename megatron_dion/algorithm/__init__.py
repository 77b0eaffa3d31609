"""The mathematics of Dion on tensors. Imports torch only; knows no processes and no Megatron."""

from megatron_dion.algorithm.config import (
    DTYPES,
    ORTHONORMALIZERS,
    RIGHT_FACTORS,
    SCALE_MODES,
    DionConfig,
)
from megatron_dion.algorithm.orthonormalize import orthonormalize
from megatron_dion.algorithm.step import (
    IN_FLIGHT,
    Block,
    Exchange,
    Matrix,
    Section,
    Stack,
    Steps,
    dion_step,
    interleave,
)

__all__ = [
    "DTYPES",
    "IN_FLIGHT",
    "ORTHONORMALIZERS",
    "RIGHT_FACTORS",
    "SCALE_MODES",
    "Block",
    "DionConfig",
    "Exchange",
    "Matrix",
    "Section",
    "Stack",
    "Steps",
    "dion_step",
    "interleave",
    "orthonormalize",
]
