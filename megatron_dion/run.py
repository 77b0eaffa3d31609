"""Run a training script that knows nothing of Dion, with `--optimizer dion`.

torchrun --nproc-per-node N -m megatron_dion.run pretrain_gpt.py <Megatron flags>
"""

import runpy
import sys
from pathlib import Path

from megatron_dion.error_line import exit_interrupted
from megatron_dion.megatron.errors import ConfigurationError, exit_with
from megatron_dion.megatron.launch import install

_USAGE = "usage: python -m megatron_dion.run SCRIPT [FLAG of the script ...]"


def main() -> None:
    """Run the script that the command line names, as if it had been started itself."""
    sys.argv = sys.argv[1:] or [""]
    script = Path(sys.argv[0])
    if not script.is_file():
        exit_with(ConfigurationError(f"{script} is not a file ({_USAGE})"))
    if not sys.flags.safe_path:
        # `python SCRIPT` searches the folder of the script, `python -m` the working folder.
        sys.path[0] = str(script.resolve().parent)
    try:
        install()
        runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        exit_interrupted()


if __name__ == "__main__":
    main()
