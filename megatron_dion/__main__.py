"""`python -m megatron_dion` trains nothing: it names what does."""

import sys

from megatron_dion.error_line import tell

tell("use `megatron-dion SUBCOMMAND`, or `python -m megatron_dion.run SCRIPT` to train")
sys.exit(2)
