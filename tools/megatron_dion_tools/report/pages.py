"""HTML pages that need nothing but themselves: their elements, and the style that all share."""

import html
from collections.abc import Iterable, Sequence

_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1c1c1e; --page: #ffffff; --faint: #6a6a70; --line: #d8d8de; --shade: #f4f4f7;
  --good: #00704f; --bad: #b3261e; --bad-shade: #fdecea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e8e8ec; --page: #17171a; --faint: #a0a0a8; --line: #3a3a42; --shade: #222228;
    --good: #4fcf9f; --bad: #ff8a80; --bad-shade: #3a1f1d;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.7rem; margin-bottom: 0; }
h2 { font-size: 1.3rem; border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1.5rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
a { color: inherit; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-size: .92em; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line); }
.scrolling { overflow-x: auto; }
th { color: var(--faint); font-weight: 600; }
.good, .bad { font-weight: 600; white-space: nowrap; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.wrong { background: var(--bad-shade); }
img { display: block; width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; margin: 1rem 0; }
details { margin: .8rem 0; background: var(--shade); border-radius: 6px; padding: .5rem .9rem; }
summary { cursor: pointer; }
details td, code { overflow-wrap: anywhere; }
code { font-size: .92em; }
@media print {
  @page { margin: 1.2cm; }
  body { max-width: none; margin: 0; padding: 0; font-size: 8.5pt; }
  img { max-height: 24cm; object-fit: contain; }
  img, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


_VOID = ("img", "input", "meta", "wbr")


class Html(str):
    """Markup; any other text is escaped before it gets into a page."""


def element(tag: str, /, *children: str, **attributes: str) -> Html:
    """An element of HTML or SVG.

    Args:
        tag: its name.
        children: markup, or text, which is escaped.
        attributes: `_` stands for `-` and, at the end, for nothing; without a value they are left
            out.
    """
    inner = "".join(c if isinstance(c, Html) else html.escape(c) for c in children)
    names = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value
    )
    return Html(f"<{tag}{names}>" if tag in _VOID else f"<{tag}{names}>{inner}</{tag}>")


def table(headings: Sequence[str], rows: Iterable[Html]) -> Html:
    """A table; `row` makes its rows. On a narrow screen it scrolls, and not the page."""
    top = element("tr", *(element("th", heading, scope="col") for heading in headings))
    content = element("table", element("thead", top), element("tbody", *rows))
    return element("div", content, class_="scrolling")


def row(*cells: str, wrong: bool = False) -> Html:
    """A row of a table, marked where it tells of something wrong."""
    columns = (element("td", cell) for cell in cells)
    return element("tr", *columns, class_="wrong" if wrong else "")


def document(heading: str, *content: str, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        heading: its title.
        content: what follows the title.
        style: CSS beyond what all pages share.
        script: JavaScript, run when the content is there.
    """
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", heading),
            element("style", Html(_STYLE + style)),
        ),
        element(
            "body",
            element("h1", heading),
            *content,
            element("script", Html(script)) if script else "",
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"
