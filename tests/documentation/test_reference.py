"""What the documentation refers to is there: flags, messages, cases, files, figures."""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dion.megatron import flags
from megatron_dion_tools.convergence.case import read_case
from tests.distributed.nursery import MODEL, TRAINING, Nursery
from tests.documentation.messages import ANYTHING, OTHER_ERRORS, raised_messages
from tests.documentation.pages import DOCS, PAGES, blocks_of, links_of
from tests.project import ROOT
from tests.unit.test_command_line import exit_of

OUR_REFUSALS = ("ConfigurationError", "CheckpointError", "SaveError", *OTHER_ERRORS)
# Letters in a row by which an entry can be searched for.
LETTERS_TO_FIND = 10


def test_flags_and_defaults_are_those_of_the_parser(nursery: Nursery) -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.+?) \|", (DOCS / "flags.md").read_text(), re.M)
    [defaults] = nursery.run(1, own_flags)
    assert dict(rows) == {flag: as_written(default) for flag, default in defaults.items()}
    assert len(rows) == len(dict(rows))


def own_flags() -> dict[str, Any]:
    """In the nursery: the defaults of the flags that are not Megatron's."""
    parser = argparse.ArgumentParser(add_help=False)
    flags.add_flags(parser)
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    return {action.option_strings[0]: action.default for action in shown}


def as_written(default: Any) -> str:
    """A default as the page writes it."""
    match default:
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


def test_flags_to_start_with_train(nursery: Nursery) -> None:
    [line] = [block.code for block in blocks_of("docs/tuning.md") if block.code.startswith("--")]
    argv = [*MODEL, *TRAINING, "--train-iters", "3", *line.split()]
    [(code, said)] = nursery.run(1, exit_of, argv)
    assert code == 0, said


def test_shortened_case_is_a_part_of_the_whole(tmp_path: Path) -> None:
    [text] = [b.code for b in blocks_of("docs/convergence.md") if b.language == "yaml"]
    (tmp_path / "topologies.yaml").write_text(text)
    whole_path = ROOT / "tests" / "convergence" / "topologies.yaml"
    shutil.copy(whole_path.with_name("tiny.args"), tmp_path)
    shown, whole = read_case(tmp_path / "topologies.yaml"), read_case(whole_path)
    assert (shown.vocab_size, shown.seeds) == (whole.vocab_size, whole.seeds)
    assert shown.runs.items() <= whole.runs.items()
    assert set(shown.checks) <= set(whole.checks)
    assert set(shown.controls) <= set(whole.controls)


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


def test_every_entry_has_words_to_search_for() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^\*\*`.+", page, re.M)
    assert not [heading for heading in headings if not can_be_found(heading)]


def can_be_found(heading: str) -> bool:
    """Whether words that never change stand in it, in the pattern or quoted after it."""
    parts = [part for quoted in re.findall("`(.+?)`", heading) for part in quoted.split(ANYTHING)]
    return max(map(len, parts)) >= LETTERS_TO_FIND


def says_something(message: str) -> bool:
    """Whether there are words in it that are known before the run."""
    return re.search(r"[a-z]", message) is not None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    """In the repository; Sphinx checks those of the site."""
    folder = (ROOT / page).parent
    assert not [link for link in links_of(page) if not (folder / link).exists()]


def test_figures_are_drawn(tmp_path: Path) -> None:
    script = DOCS / "figures" / "draw.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "images").glob("*.svg")}
    assert {f"images/{name}" for name in drawn} <= set(links_of("docs/how_it_works.md"))
