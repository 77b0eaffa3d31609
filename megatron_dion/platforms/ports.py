"""Ports of this machine."""

import secrets
import socket


def free_port() -> int:
    """A port that nobody listens on, below those that systems give to connections by themselves."""
    while True:
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
