"""What the documentation refers to is there: flags, messages, files, figures."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dion.megatron import flags
from megatron_dion_tools import cli
from tests.distributed.tiny_gpt import MODEL, TRAINING
from tests.documentation.pages import DOCS, PAGES, blocks_of, links_of
from tests.project import ROOT
from tests.worlds import in_host, world

PACKAGES = ("megatron_dion", "tools")


def test_flags_and_defaults_are_those_of_the_parser() -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.+?) \|", (DOCS / "flags.md").read_text(), re.M)
    defaults = in_host(own_flags)
    assert dict(rows) == {flag: as_written(default) for flag, default in defaults.items()}
    assert len(rows) == len(dict(rows))


def own_flags() -> dict[str, Any]:
    """In the host of the ranks: the defaults of the flags that are not Megatron's."""
    parser = argparse.ArgumentParser(add_help=False)
    flags.add_flags(parser)
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    return {action.option_strings[0]: action.default for action in shown}


def test_all_that_is_gone_is_refused_by_its_name() -> None:
    table = (ROOT / "CHANGELOG.md").read_text().partition("### Removed")[2]
    gone = " ".join(re.findall(r"^\| (.+?) \|", table, re.M))
    assert set(re.findall(r"`(--[\w-]+)`", gone)) == set(flags.REMOVED)
    commands = re.findall(r"`megatron-dion ([a-z-]+(?: [a-z-]+)?)", gone)
    assert set(commands) == set(cli.REMOVED)


def as_written(default: Any) -> str:
    """A default as the page writes it."""
    if isinstance(default, list):
        default = ",".join(default) or None
    if isinstance(default, str):
        return f"`{default}`"
    return {None: "none", False: "off"}.get(default, str(default))


@pytest.mark.slow
def test_flags_to_start_with_train() -> None:
    [shown] = [block.code for block in blocks_of("docs/tuning.md") if block.code.startswith("--")]
    world(1).train(*MODEL, *TRAINING, "--train-iters", "3", *shown.split())


def test_explained_messages_are_those_of_the_code() -> None:
    """What is put into a message at run time is an ellipsis on the page."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    text = re.sub(r'"\n\s*f?"', "", text)  # strings over several lines
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\*\*`(.+)`\*\*", page, re.M)
    assert explained
    for message in explained:
        assert re.search(re.escape(message.removesuffix(": …")).replace("…", ".*"), text), message


def test_links_lead_to_files() -> None:
    """In the repository; Sphinx checks those of the site."""
    links = [(page, link) for page in PAGES for link in links_of(page)]
    assert [
        (page, link) for page, link in links if not ((DOCS.parent / page).parent / link).exists()
    ] == []


@pytest.mark.slow
def test_figures_are_drawn(tmp_path: Path) -> None:
    script = DOCS / "figures" / "draw.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "images").glob("*.svg")}
    pages = ("README.md", "docs/how_it_works.md", "docs/residual.md")
    links = {link.removeprefix("docs/") for page in pages for link in links_of(page)}
    assert {f"images/{name}" for name in drawn} <= links
