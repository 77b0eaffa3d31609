"""The way into training: everything that has to happen before megatron is imported."""

import sys
from collections.abc import Sequence

from megatron_dion.error_line import exit_interrupted
from megatron_dion.platforms import cpu, requested_device, resolve_device
from megatron_dion.training import environment
from megatron_dion.training.errors import TOLD_IN_ONE_LINE, ConfigurationError, exit_with


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says. A mistake in it ends the process with one line and code 2.

    So does an interrupt from the keyboard, with code 130.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    try:
        train(sys.argv[1:] if argv is None else list(argv))
    except TOLD_IN_ONE_LINE as error:
        exit_with(error)
    except KeyboardInterrupt:
        exit_interrupted()


def train(argv: Sequence[str]) -> None:
    """Train as the command line says.

    Raises:
        ConfigurationError: The run cannot start as it was asked for.
        CheckpointError: A checkpoint cannot be loaded or saved.
    """
    # It imports this module.
    from megatron_dion.training import dropin

    if dropin.is_installed():
        raise ConfigurationError(
            "this script is megatron-dion's own and has Dion already: start it without"
            " megatron_dion.run and install()"
        )
    environment.describe_single_process()
    device = prepare(argv)

    # Only now: importing megatron binds names of torch.cuda.
    from megatron_dion.training.pretrain import pretrain_gpt

    pretrain_gpt(argv, device)


def prepare(argv: Sequence[str]) -> str:
    """Do all that must happen before megatron is imported, on CPU together with its import.

    Args:
        argv: The command line, of which `--device` counts.

    Returns:
        The device, `cuda` or `cpu`.

    Raises:
        ConfigurationError: There is another megatron-core, or not the device that was asked for.
    """
    for check in environment.CHECKS:
        check()
    requested = requested_device(argv)
    device = resolve_device(requested)
    environment.check_device(device)
    if device == "cpu":
        cpu.install(hide_gpus=requested == "cpu")
        cpu.install_megatron_patches()
    return device
