"""The command `megatron-dion doctor` for `torchrun tools/doctor.py`, which wants a file."""

import sys

from megatron_dion.cli import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
