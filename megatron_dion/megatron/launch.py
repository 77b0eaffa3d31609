"""The two ways into training: a command line for pretrain_gpt.py, `install()` for other scripts."""

import sys
from collections.abc import Sequence
from types import TracebackType

from megatron_dion.error_line import exit_interrupted
from megatron_dion.megatron import environment
from megatron_dion.megatron.errors import ONE_LINE_ERRORS, exit_with, refuse

_installed = False


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says. A mistake in it ends the process with one line and code 2.

    An interrupt from the keyboard ends it with code 130.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    try:
        train(sys.argv[1:] if argv is None else list(argv))
    except ONE_LINE_ERRORS as error:
        exit_with(error)
    except KeyboardInterrupt:
        exit_interrupted()


def train(argv: Sequence[str]) -> None:
    """Train as the command line says.

    Raises:
        ConfigurationError: The run cannot start as it was asked for.
        CheckpointError: A checkpoint cannot be loaded or saved.
    """
    refuse(
        "this script is megatron-dion's own and has Dion already: start it without"
        " megatron_dion.run and install()",
        when=_installed,
    )
    environment.describe_single_process()
    device = environment.prepare(argv)

    # Only now: importing megatron binds names of torch.cuda.
    from megatron_dion.megatron.pretrain import pretrain_gpt

    pretrain_gpt(argv, device)


def install() -> None:
    """Let the script that calls it train with `--optimizer dion`.

    To be called before the script imports megatron. From then on megatron.training's parser has our
    flags, its validation our checks, and `pretrain` whatever else a run gets; the script itself
    needs no change. The device is read from `--device` on the process's command line. An uncaught
    mistake of the user ends the process with one line. A second call does nothing.

    Raises:
        ConfigurationError: Megatron has been imported, is not the tested version, or there is no
            such device.
    """
    global _installed
    if _installed:
        return
    _report_mistakes_in_one_line()
    environment.check_megatron_is_not_imported()
    device = environment.prepare(sys.argv[1:])
    environment.check_imported_version()

    # Only now: importing megatron binds names of torch.cuda.
    from megatron_dion.megatron.join import Join

    Join(device, script_is_ours=False).install()
    _installed = True


def _report_mistakes_in_one_line() -> None:
    before = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ONE_LINE_ERRORS):
            exit_with(error)
        before(kind, error, traceback)

    sys.excepthook = report
