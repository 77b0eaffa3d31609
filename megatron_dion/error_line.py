"""How a mistake or an interrupt is reported: one line on stderr, for people and for programs."""

import sys
from typing import NoReturn

PREFIX = "error: "


def tell(reason: object) -> None:
    """Print the line."""
    print(f"{PREFIX}{reason}", file=sys.stderr, flush=True)


def exit_interrupted() -> NoReturn:
    """End after an interrupt from the keyboard, with the exit code that a shell gives it."""
    print("interrupted", file=sys.stderr)
    sys.exit(130)
