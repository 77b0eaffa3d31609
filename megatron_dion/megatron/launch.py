"""The two ways into training: a command line for pretrain_gpt.py, `install()` for other scripts."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from megatron_dion.error_line import exit_interrupted
from megatron_dion.megatron import capabilities
from megatron_dion.megatron.errors import ONE_LINE_ERRORS, exit_with, refuse
from megatron_dion.platforms import cpu, describe_single_process, resolve_device

_installed = False


def main(argv: Sequence[str] | None = None) -> None:
    """Train as `argv` or the command line says; code 2 ends what is wrong, 130 an interrupt."""
    try:
        train(sys.argv[1:] if argv is None else argv)
    except ONE_LINE_ERRORS as error:
        exit_with(error)
    except KeyboardInterrupt:
        exit_interrupted()


def train(argv: Sequence[str]) -> None:
    """Train as the command line says; what is wrong with it is one of `ONE_LINE_ERRORS`."""
    refuse(
        "this script is megatron-dion's own and has Dion already: start it without"
        " megatron_dion.run and install()",
        when=_installed,
    )
    describe_single_process()
    device = prepare(argv)

    # Only now: importing megatron binds names of torch.cuda.
    with capabilities.importing("pretrain_gpt.py, unlike a script of yours (docs/switching.md),"):
        from megatron_dion.megatron.pretrain import pretrain_gpt

    pretrain_gpt(argv, device)


def install() -> None:
    """Let the script that calls it train with `--optimizer dion`.

    To be called before the script imports megatron. From then on megatron.training's parser has our
    flags, its validation our checks, and `pretrain` whatever else a run gets; the script itself
    needs no change. The device is read from `--device` on the process's command line. An uncaught
    mistake of the user ends the process with one line. A second call does nothing.
    """
    global _installed
    if _installed:
        return
    usual_report = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if isinstance(error, ONE_LINE_ERRORS):
            exit_with(error)
        usual_report(kind, error, traceback)

    sys.excepthook = report
    refuse(
        "megatron has been imported already: call megatron_dion.install() before the first import "
        "of megatron, or start the script by `python -m megatron_dion.run`",
        when=sys.modules.keys() & {"megatron.core", "megatron.training"},
    )
    device = prepare(sys.argv[1:])

    # Only now: importing megatron binds names of torch.cuda.
    with capabilities.importing("Dion"):
        from megatron_dion.megatron.hooks import TrainingHooks

    TrainingHooks(device, script_is_ours=False).install()
    _installed = True


def prepare(argv: Sequence[str]) -> str:
    """Do all that must happen before megatron is imported, on CPU together with its import.

    Returns the device of `--device`. The full parser reports a value that is no device.
    """
    capabilities.begin_with_megatron()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    requested = parser.parse_known_args(argv)[0].device
    device = resolve_device(requested)
    refuse(
        "--device cuda: torch sees no CUDA device; use --device cpu",
        when=device == "cuda" and not torch.cuda.is_available(),
    )
    if device == "cpu":
        with capabilities.importing("training on CPU"):
            cpu.install(hide_gpus=requested == "cpu")
    return device
