"""What the processes of a run are started with: which device, and where they meet."""

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
