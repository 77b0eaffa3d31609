"""Code blocks of the documentation, and which of them are run.

The word after the language of a shell or Python block says why it is not run; without one, it is.
A comment on the line before a block may change how:

    <!-- tests run: COMMAND -->     this in its place: the same thing, smaller
    <!-- tests prepend: FILE -->    after the content of this file, which is beside this module
    <!-- tests in: FILE -->         by this test module; the block is marked `tested`
"""

import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt

from tests.project import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "docs/results/*.md", "*/README.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
)
MARKS = frozenset(runpy.run_path(str(DOCS / "conf.py"))["MARKS"])
RUN = ("bash", "python")
SHOWN = ("text", "yaml", "{toctree}", "{eval-rst}")

_COMMENT = re.compile(r"<!-- tests (run|prepend|in): (.+) -->")
# How commands begin; nothing like it may stand in a block that is only shown.
_COMMAND = re.compile(
    r"^([A-Z_]+=\S+ )*(\.venv/bin/)?(python|pip|make|torchrun|megatron-dion|sbatch|srun)3? ", re.M
)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        place: page and line.
        language: the first word of the fence.
        mark: its other words; empty for a block that is run.
        code: what is shown.
        variant: what is run in its place.
        prelude: a file whose content comes first.
        module: the tests that run it, where it is marked `tested`.
    """

    place: str
    language: str
    mark: str
    code: str
    variant: str | None = None
    prelude: str | None = None
    module: str | None = None

    @property
    def is_run(self) -> bool:
        return self.language in RUN and not self.mark

    @property
    def fault(self) -> str | None:
        """Why the block is neither run nor rightly left out."""
        if self.language not in RUN + SHOWN:
            return f"the language {self.language!r} is neither run {RUN} nor shown {SHOWN}"
        if self.language in SHOWN:
            return "a command that is not run" if _COMMAND.search(self.code) else None
        if self.mark not in MARKS | {""}:
            return f"the mark {self.mark!r} is none of {sorted(MARKS)}"
        if (self.mark == "tested") != bool(self.module):
            return "the mark 'tested' and a comment that names the tests go together"
        if self.module and not (ROOT / self.module).is_file():
            return f"there is no {self.module}"
        return None


def links_of(page: str) -> list[str]:
    """Returns the files to which a page links, relative to its folder; pictures too."""
    links = (
        str(child.attrs.get("href") or child.attrs.get("src") or "")
        for token in MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())
        for child in token.children or ()
    )
    paths = (link.partition("#")[0] for link in links if "://" not in link)
    return [path for path in paths if path]


def blocks_of(page: str) -> list[Block]:
    """Returns all code blocks of a page, in their order."""
    return list(_blocks(page, (ROOT / page).read_text(encoding="utf-8")))


def _blocks(page: str, text: str) -> Iterator[Block]:
    lines = text.splitlines()
    for token in MarkdownIt("commonmark").parse(text):
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map is not None
        line = token.map[0]
        language, _, mark = token.info.partition(" ")
        comment = _COMMENT.fullmatch(lines[line - 1].strip()) if line else None
        how = {comment[1]: comment[2]} if comment else {}
        yield Block(
            *(f"{page}:{line + 1}", language, mark, token.content),
            *(how.get("run"), how.get("prepend"), how.get("in")),
        )
