"""Dion (Distributed Orthonormalized Updates) for Megatron-core's distributed optimizer."""

from megatron_dion.algorithm import DionConfig
from megatron_dion.optimizer.dion import Dion

__version__ = "0.1.0"

__all__ = ["Dion", "DionConfig", "__version__"]
