"""The documentation site: `make docs`.

The pages are plain Markdown that reads as well in the repository. What differs on the site is done
to their text as it is read: marks of code blocks are written out, and pages that live beside what
they describe are brought in.
"""

import posixpath
import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
PROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "megatron-dion"
author = "the authors of megatron-dion"
project_copyright = author
release = version = PROJECT["version"]

default_role = "code"  # single backticks, as in Markdown
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
# Types in docstrings are words, and some are of other projects.
nitpick_ignore_regex = [("py:(class|exc)", ".*")]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_include_init_with_doc = True

html_theme = "furo"
html_title = f"megatron-dion {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
copybutton_prompt_text = "$ "

# What a word after the language of a fence means; tests/documentation reads the same marks.
MARKS = {
    "gpu": "Needs a GPU; not run by the tests.",
    "container": "Needs a container engine; not run by the tests.",
    "cluster": "Needs a cluster; not run by the tests.",
    "ci": "Continuous integration itself.",
    "tested": "Run by a test of its own, smaller where it takes long.",
}

# Pages that live beside what they describe.
ELSEWHERE = {
    "benchmarks": "../benchmarks/README.md",
    "changelog": "../CHANGELOG.md",
    "contributing": "../CONTRIBUTING.md",
}

FENCE = re.compile(rf"^( *)```(\w+) ({'|'.join(MARKS)})$", re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#)([^)]+)\)")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _adapt)


def _adapt(app: Sphinx, page: str, source: list[str]) -> None:
    text = source[0]
    if page in ELSEWHERE:
        path = ELSEWHERE[page]
        folder = posixpath.dirname(path)
        text = (DOCS / path).read_text(encoding="utf-8")
        text = LINK.sub(lambda link: f"]({posixpath.normpath(f'{folder}/{link[1]}')})", text)
        text = text.replace("](../docs/", "](")
    if page.startswith("results/"):
        text = f"---\norphan: true\n---\n{text}"  # linked from results.md
    for name, path in ELSEWHERE.items():
        text = text.replace(f"]({path})", f"]({name}.md)")
    source[0] = FENCE.sub(_spell_out, text)


def _spell_out(fence: re.Match[str]) -> str:
    indent, language, mark = fence.groups()
    return f"{indent}*{MARKS[mark]}*\n\n{indent}```{language}"
