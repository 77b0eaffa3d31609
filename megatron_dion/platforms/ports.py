"""Ports of this machine."""

import secrets
import socket

# Below those that systems give to connections by themselves: one of these would often be taken
# again before the first rank listens on it.
_PORTS = range(20000, 32768)


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
