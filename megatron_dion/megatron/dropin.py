"""`megatron_dion.install()`: Dion in scripts that are not ours."""

import sys
from types import TracebackType

from megatron_dion.megatron import environment
from megatron_dion.megatron.errors import TOLD_IN_ONE_LINE, exit_with

_installed = False


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
    _tell_mistakes_in_one_line()
    environment.check_megatron_is_to_come()
    device = environment.prepare(sys.argv[1:])
    environment.check_imported_version()

    # Only now: importing megatron binds names of torch.cuda.
    from megatron_dion.megatron.join import Join

    Join(device, script_is_ours=False).install()
    _installed = True


def is_installed() -> bool:
    """Whether a script that is not ours trains in this process."""
    return _installed


def _tell_mistakes_in_one_line() -> None:
    before = sys.excepthook

    def tell(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, TOLD_IN_ONE_LINE):
            exit_with(error)
        before(kind, error, traceback)

    sys.excepthook = tell
