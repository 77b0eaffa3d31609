"""Flags and messages in the documentation are those of the code."""

import argparse
import re

from megatron_dion.training import arguments
from tests.documentation.messages import raised_messages
from tests.documentation.pages import DOCS

OUR_REFUSALS = ("ConfigurationError", "CheckpointError", "SaveError")


def test_flags_and_defaults_are_those_of_the_parser() -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.+?) \|", (DOCS / "flags.md").read_text(), re.M)
    assert dict(rows) == {action.option_strings[0]: default_of(action) for action in own_flags()}
    assert len(rows) == len(dict(rows))


def own_flags() -> list[argparse.Action]:
    """The flags that are not Megatron's."""
    parser = argparse.ArgumentParser(add_help=False)
    arguments._add_dion_arguments(parser)
    arguments._add_run_arguments(parser)
    return parser._actions


def default_of(action: argparse.Action) -> str:
    """A default as the page writes it."""
    match action.default:
        case None | []:
            return "none"
        case False:
            return "off"
        case str(name):
            return f"`{name}`"
        case [*names]:
            return f"`{','.join(names)}`"
        case number:
            return str(number)


def test_every_refusal_is_explained() -> None:
    unexplained = {message for message in raised_messages(OUR_REFUSALS) if says_something(message)}
    unexplained -= explained()
    assert not unexplained


def test_every_explained_message_exists() -> None:
    assert explained() <= raised_messages()


def explained() -> set[str]:
    """The messages that the page about them has an entry for."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\*\*`(.+)`\*\*", page, re.M))


def says_something(message: str) -> bool:
    """Whether there are words in it that are known before the run."""
    return re.search(r"[a-z]", message) is not None
