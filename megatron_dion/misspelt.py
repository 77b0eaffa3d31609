"""What a flag that a parser does not know was probably meant to be."""

import argparse
import difflib
from collections.abc import Iterator


def with_suggestion(message: str, parser: argparse.ArgumentParser) -> str:
    """Add to a parser's complaint about unknown arguments which flags are spelt alike."""
    known = list(_flags(parser))
    flags = message.partition("unrecognized arguments: ")[2].split()
    close = (
        difflib.get_close_matches(f.partition("=")[0], known, 1, 0.7)
        for f in flags
        if f.startswith("--")
    )
    alike = [match for matches in close for match in matches]
    return f"{message}: did you mean {', '.join(alike)}?" if alike else message


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _flags(subparser)
