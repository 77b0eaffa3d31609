"""Dion (Distributed Orthonormalized Updates) for Megatron-core's distributed optimizer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dion.algorithm import DionConfig
    from megatron_dion.megatron.dropin import install
    from megatron_dion.optimizer.dion import Dion

__version__ = "0.1.0"

__all__ = ["Dion", "DionConfig", "__version__", "install"]

_HOMES = {
    "Dion": "megatron_dion.optimizer.dion",
    "DionConfig": "megatron_dion.algorithm",
    "install": "megatron_dion.megatron.dropin",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: the command line's `--help` should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
