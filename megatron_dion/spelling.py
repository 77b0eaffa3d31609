"""Which flag a misspelt one was probably meant to be."""

import argparse
import difflib
from collections.abc import Iterator

# How argparse begins the message about flags that it does not know.
_UNKNOWN = "unrecognized arguments: "
# Ratio of equal letters from which one flag is taken for another.
_ALIKE = 0.7


def did_you_mean(message: str, parser: argparse.ArgumentParser) -> str:
    """Return the end of argparse's message that names the flags that were meant, or "".

    Args:
        message: What argparse says of a command line.
        parser: The parser that says it; the flags of its subcommands count as well.
    """
    if not message.startswith(_UNKNOWN):
        return ""
    known = list(_flags_of(parser))
    words = [word.partition("=")[0] for word in message.removeprefix(_UNKNOWN).split()]
    misspelt = [word for word in words if word.startswith("--")]
    meant = [
        flag for word in misspelt for flag in difflib.get_close_matches(word, known, 1, _ALIKE)
    ]
    return f": did you mean {', '.join(meant)}?" if meant else ""


def _flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _flags_of(subparser)
