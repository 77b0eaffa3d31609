"""Imports and computes, before a fork, what every rank would spend more than a second on."""

import argparse
import functools
import gc
import tempfile
from pathlib import Path


def preload() -> None:
    """Make this process a parent of ranks that train on CPU.

    Installs the CPU platform, which changes torch for the whole process and for its children.
    """
    from megatron_dion.platforms import cpu

    cpu.install(hide_gpus=True)
    cpu.install_megatron_patches()

    _read_help_texts_once()
    _load_what_trainings_use()
    start_queues_by("fork")
    gc.freeze()  # the collector of a rank would write to memory that all share


def _read_help_texts_once() -> None:
    """Megatron's parser takes its help texts from source files, again for each parser."""
    import megatron.training.arguments
    from megatron.training.argument_utils import ArgumentGroupFactory

    read_docstrings = ArgumentGroupFactory._get_field_docstrings
    cached = functools.cache(
        lambda kind: read_docstrings(object.__new__(ArgumentGroupFactory), kind)
    )
    ArgumentGroupFactory._get_field_docstrings = lambda self, kind: cached(kind)
    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())


def _load_what_trainings_use() -> None:
    """The modules of a training, and the fonts of a picture."""
    from megatron_dion.megatron import plot, pretrain  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        plot.draw_loss(
            [{"kind": "train", "iteration": 1, "lm_loss": 1.0}], Path(folder, "loss.png"), None
        )


def start_queues_by(method: str) -> None:
    """How a rank that saves starts the process of its queue; spawned ones import torch again."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )

    get_write_results_queue.__wrapped__.__defaults__ = (method,)
