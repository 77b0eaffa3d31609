"""The way into training: everything that has to happen before megatron is imported."""

import os
import sys
from collections.abc import Sequence

from megatron_dion.platforms import cpu, requested_device, resolve_device
from megatron_dion.training import environment
from megatron_dion.training.errors import TOLD_IN_ONE_LINE, exit_with


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says. A mistake in it ends the process with one line and code 2.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    try:
        train(sys.argv[1:] if argv is None else list(argv))
    except TOLD_IN_ONE_LINE as error:
        exit_with(error)


def train(argv: Sequence[str]) -> None:
    """Train as the command line says.

    Raises:
        ConfigurationError: The run cannot start as it was asked for.
        CheckpointError: A checkpoint cannot be loaded or saved.
    """
    for check in environment.CHECKS:
        check()
    requested = requested_device(argv)
    device = resolve_device(requested)
    environment.check_device(device)
    environment.describe_single_process()
    if device == "cpu":
        cpu.install(hide_gpus=requested == "cpu", quiet=os.environ["RANK"] != "0")
        cpu.install_megatron_patches()

    # Only now: importing megatron binds names of torch.cuda.
    from megatron_dion.training.pretrain import pretrain_gpt

    pretrain_gpt(argv, device)
