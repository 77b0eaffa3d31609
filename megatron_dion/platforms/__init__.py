"""What the processes of a run are started with: which device, and where they meet."""

import os
import secrets
import socket

import torch


def resolve_device(requested: str) -> str:
    """Turn `auto` into `cuda` or `cpu`, whichever this machine has."""
    if requested != "auto":
        return requested
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_port() -> int:
    """A port that nobody listens on, below those that systems give to connections by themselves."""
    while True:
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def describe_single_process() -> None:
    """Without a launcher, describe a world of one process as torchrun would."""
    if "RANK" not in os.environ:
        sizes = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(sizes, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
