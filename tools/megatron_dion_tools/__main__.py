"""The command `megatron-dion`, for `python -m` and `torchrun -m`."""

from megatron_dion_tools.cli import main

if __name__ == "__main__":
    main()
