"""The command `megatron-dion`, for `python -m` and `torchrun -m`."""

from megatron_dion.cli import main

if __name__ == "__main__":
    main()
