"""The way into training by a command line: a script of ours."""

import sys
from collections.abc import Sequence

from megatron_dion.error_line import exit_interrupted
from megatron_dion.megatron import dropin, environment
from megatron_dion.megatron.errors import TOLD_IN_ONE_LINE, ConfigurationError, exit_with


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
    if dropin.is_installed():
        raise ConfigurationError(
            "this script is megatron-dion's own and has Dion already: start it without"
            " megatron_dion.run and install()"
        )
    environment.describe_single_process()
    device = environment.prepare(argv)

    # Only now: importing megatron binds names of torch.cuda.
    from megatron_dion.megatron.pretrain import pretrain_gpt

    pretrain_gpt(argv, device)
