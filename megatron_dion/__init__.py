"""Dion (Distributed Orthonormalized Updates) for Megatron-core's distributed optimizer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dion.algorithm.config import DionConfig
    from megatron_dion.megatron.launch import install
    from megatron_dion.optimizer.dion import Dion

__version__ = "0.1.0"

__all__ = ["Dion", "DionConfig", "__version__", "install"]

_MODULES = {
    "Dion": "megatron_dion.optimizer.dion",
    "DionConfig": "megatron_dion.algorithm.config",
    "install": "megatron_dion.megatron.launch",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: a command's `--help` should not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
