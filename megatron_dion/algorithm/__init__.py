"""The mathematics of Dion on tensors. Imports torch only; knows no processes and no Megatron."""

from megatron_dion.algorithm.config import ORTHONORMALIZERS, SCALE_MODES, DionConfig
from megatron_dion.algorithm.orthonormalize import orthonormalize
from megatron_dion.algorithm.step import Block, Exchange, Matrix, dion_step

__all__ = [
    "ORTHONORMALIZERS",
    "SCALE_MODES",
    "Block",
    "DionConfig",
    "Exchange",
    "Matrix",
    "dion_step",
    "orthonormalize",
]
