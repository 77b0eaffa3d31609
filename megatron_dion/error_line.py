"""How a mistake or an interrupt is told: one line on stderr, which is also found in logs."""

import sys
from typing import NoReturn

PREFIX = "error: "


def tell(reason: object) -> str:
    """Print the line, and return it."""
    line = f"{PREFIX}{reason}"
    print(line, file=sys.stderr, flush=True)
    return line


def exit_interrupted() -> NoReturn:
    """End after an interrupt from the keyboard, with the code that a shell gives it."""
    print("interrupted", file=sys.stderr)
    sys.exit(130)
