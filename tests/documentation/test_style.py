"""Pages are short, and so are their sentences."""

import re
from collections.abc import Iterator

import pytest
from markdown_it import MarkdownIt

from tests.documentation.pages import PAGES
from tests.project import ROOT

SHORT = [page for page in PAGES if not page.startswith("docs/results/") and page != "CHANGELOG.md"]


def test_pages_are_short() -> None:
    counted = [page for page in SHORT if page.startswith("docs/") or page == "README.md"]
    words = {page: len((ROOT / page).read_text(encoding="utf-8").split()) for page in counted}
    assert max(words.values()) <= 2_500, words
    assert sum(words.values()) <= 15_000, words


@pytest.mark.parametrize("page", SHORT)
def test_sentences_are_short(page: str) -> None:
    assert [sentence for sentence in sentences_of(page) if len(sentence.split()) > 40] == []


def sentences_of(page: str) -> Iterator[str]:
    """Those outside of code and tables; of a link, what a reader sees."""
    breaks, is_in_table = {"softbreak": " ", "hardbreak": "\n"}, False
    text = (ROOT / page).read_text(encoding="utf-8")
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("table_open", "table_close"):
            is_in_table = token.type == "table_open"
        if token.type == "inline" and not is_in_table:
            seen = "".join(breaks.get(c.type, c.content) for c in token.children or ())
            yield from re.split(r"(?<=[.?!])\s+|\n", seen)
