"""The mathematics of Dion on tensors. Imports torch only; knows no processes and no Megatron."""

from megatron_dion.algorithm.config import (
    DTYPES,
    ORTHONORMALIZERS,
    RIGHT_FACTORS,
    SCALE_MODES,
    DionConfig,
)
from megatron_dion.algorithm.exchange import Exchange, Matrix, Section, Stack, Steps
from megatron_dion.algorithm.foreach import copy_all
from megatron_dion.algorithm.orthonormalize import orthonormalize
from megatron_dion.algorithm.products import PRECISIONS, float32_products_in
from megatron_dion.algorithm.step import (
    IN_FLIGHT,
    NOBODY,
    Block,
    Observer,
    dion_step,
    interleave,
)

__all__ = [
    "DTYPES",
    "IN_FLIGHT",
    "NOBODY",
    "ORTHONORMALIZERS",
    "PRECISIONS",
    "RIGHT_FACTORS",
    "SCALE_MODES",
    "Block",
    "DionConfig",
    "Exchange",
    "Matrix",
    "Observer",
    "Section",
    "Stack",
    "Steps",
    "copy_all",
    "dion_step",
    "float32_products_in",
    "interleave",
    "orthonormalize",
]
