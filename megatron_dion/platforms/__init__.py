"""Which device the processes of a run use, decided before megatron is imported."""

import argparse
from collections.abc import Sequence

import torch

DEVICES = ("auto", "cuda", "cpu")


def requested_device(argv: Sequence[str]) -> str:
    """Read `--device` out of a command line that holds many other flags.

    Args:
        argv: The arguments after the program's name.

    Returns:
        The value as typed, `auto` where there is none. Whether it is one of `DEVICES` is left to
        the full parser, which reports it with all other faults of the command line.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    return str(parser.parse_known_args(argv)[0].device)


def resolve_device(requested: str) -> str:
    """Turn `auto` into `cuda` or `cpu`, whichever this machine has."""
    if requested != "auto":
        return requested
    return "cuda" if torch.cuda.is_available() else "cpu"
