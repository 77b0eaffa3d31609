"""Does once, before ranks are forked, what would take every rank more than a second."""

import argparse
import contextlib
import functools
import gc


def preload() -> None:
    """Prepare this process to fork ranks that train on the CPU.

    The CPU platform that this function installs changes torch for the whole process and for its
    children.
    """
    from megatron_dion.platforms import cpu

    cpu.install(hide_gpus=True)

    import megatron.core.tokenizers.text.text_tokenizer  # and transformers, where it is installed
    import megatron.training.arguments
    from megatron.training.argument_utils import ArgumentGroupFactory

    with contextlib.suppress(ImportError):  # megatron-core 0.18 lacks a function that it needs
        from megatron_dion.megatron import pretrain  # noqa: F401  (what trainings import)

    # Megatron's parser reads its help texts from source files each time that it is built.
    read_docstrings = ArgumentGroupFactory._get_field_docstrings
    nobody = object.__new__(ArgumentGroupFactory)
    cached = functools.cache(lambda kind: read_docstrings(nobody, kind))
    ArgumentGroupFactory._get_field_docstrings = lambda self, kind: cached(kind)
    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())
    start_queues_by("fork")
    gc.freeze()  # Otherwise the garbage collector of each rank would copy the shared pages.


def start_queues_by(method: str) -> None:
    """Choose how a rank that saves a checkpoint starts the process of its queue.

    A process that is spawned imports torch again, one that is forked does not.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue.__wrapped__.__defaults__ = (method,)
