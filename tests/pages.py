"""Reads the HTML pages that the project writes."""

from collections.abc import Mapping
from html.parser import HTMLParser


class Page(HTMLParser):
    """Reads a page; fails where elements are not nested."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[tuple[str, list[str]]] = []
        self.contents: list[tuple[str, list[str]]] = []
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.wrong: list[list[str]] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "wbr"):
            self.open.append((tag, []))
            self.contents.append(self.open[-1])
        if tag == "tr":
            self.rows.append([])
            if dict(attrs).get("class") == "wrong":
                self.wrong.append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, content in self.open:
            content.append(data)
        if {"td", "th"} & {tag for tag, _ in self.open}:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[Mapping[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        """What is written in each element of a kind."""
        return ["".join(content) for name, content in self.contents if name == tag]
