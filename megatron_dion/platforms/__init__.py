"""Which device the processes of a run use."""

import torch

DEVICES = ("auto", "cuda", "cpu")


def resolve_device(requested: str) -> str:
    """Turn `auto` into `cuda` or `cpu`, whichever this machine has."""
    if requested != "auto":
        return requested
    return "cuda" if torch.cuda.is_available() else "cpu"
