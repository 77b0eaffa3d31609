"""The two ways into training: a command line for pretrain_gpt.py, `install()` for other scripts."""

import sys
from collections.abc import Sequence
from typing import Any

from megatron_dion.error_line import exit_interrupted
from megatron_dion.megatron import environment
from megatron_dion.megatron.errors import ONE_LINE_ERRORS, exit_with, refuse

_installed = False


def main(argv: Sequence[str] | None = None) -> None:
    """Train as `argv` or the command line says, which ends with one line and code 2 if it is wrong.

    An interrupt from the keyboard ends it with code 130.
    """
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
    usual_report = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if isinstance(error, ONE_LINE_ERRORS):
            exit_with(error)
        usual_report(kind, error, traceback)

    sys.excepthook = report
    environment.check_megatron_is_not_imported()
    device = environment.prepare(sys.argv[1:])

    # Only now: importing megatron binds names of torch.cuda.
    from megatron_dion.megatron.join import Join

    Join(device, script_is_ours=False).install()
    _installed = True
