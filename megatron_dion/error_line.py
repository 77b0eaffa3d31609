"""How a mistake is told: one line on stderr, which is also found in logs."""

import sys

PREFIX = "error: "


def tell(reason: object) -> str:
    """Print the line, and return it."""
    line = f"{PREFIX}{reason}"
    print(line, file=sys.stderr, flush=True)
    return line
