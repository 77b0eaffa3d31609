"""Every code block in README and documentation is run, or says why it is not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.documentation.pages import COMMAND, PAGES, Block, blocks_in, blocks_of
from tests.project import ROOT, copy_project

# These would install into the environment of the tests.
NEVER_RUN = re.compile(r"make |pip install(?! --dry-run )")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project that commands may write into; prepared data are shared."""
    project = tmp_path / "megatron-dion"
    copy_project(project)
    (ROOT / "data").mkdir(exist_ok=True)
    (project / "data").symlink_to(ROOT / "data")
    (project / ".venv").symlink_to(sys.prefix)
    return project


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    assert not [f"{block.place}: {block.fault}" for block in blocks_of(page) if block.fault]


def test_continuous_integration_runs_what_is_left_to_it() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page) if block.mark == "ci"]
    commands = {line.partition("#")[0].strip() for b in blocks for line in b.code.splitlines()}
    assert commands - {f"make {target}" for target in targets_of_ci()} == set()
    assert "make test" in commands


def targets_of_ci() -> set[str]:
    """The targets of `make` that .ci/run names, and those which these need."""
    rules = dict(re.findall(r"^([\w-]+): *([^=\n]*)$", (ROOT / "Makefile").read_text(), re.M))
    left = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    found: set[str] = set()
    while left:
        found.add(target := left.pop())
        left += [needed for needed in rules[target].split() if needed in rules]
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.is_run for b in blocks_of(p))])
def test_blocks_run(page: str, project: Path) -> None:
    """One after the other, as a reader would."""
    for block in blocks_of(page):
        if block.is_run:
            run(block, project)


def run(block: Block, project: Path) -> None:
    """Runs a block in the project's root, with the environment's programs on the path."""
    code = block.variant or block.code
    assert not NEVER_RUN.search(code), block.place
    if block.prelude:
        code = (Path(__file__).parent / block.prelude).read_text(encoding="utf-8") + code
    interpreter = ["bash", "-euo", "pipefail", "-c"]
    if block.language == "python" and not block.variant:
        interpreter = [sys.executable, "-c"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*interpreter, code],
        cwd=project,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(project)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{block.place} ended with {done.returncode}:\n{done.stdout}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```bash\nls\n```", None),
        ("```bash gpu\nnvidia-smi\n```", None),
        ("<!-- tests in: tests/project.py -->\n```bash tested\nls\n```", None),
        ("<!-- tests in: tests/none.py -->\n```bash tested\nls\n```", "there is no tests/none.py"),
        (
            "<!-- tests in: tests/project.py -->\n```bash tested\npython -m benchmarks.step\n```",
            "tests/project.py does not name 'benchmarks.step'",
        ),
        (
            "<!-- tests in: tests/project.py -->\n```bash tested\nmegatron-dion plan 8B\n```",
            "tests/project.py does not name 'plan'",
        ),
        ("<!-- tests in: tests/project.py -->\n```bash gpu\nls\n```", "the mark 'tested' and"),
        ("```bash tested\nls\n```", "the mark 'tested' and"),
        ("```bash later\nls\n```", "the mark 'later' is none of"),
        ("```text\nB = M + G\n```", None),
        ("```text\nmake train\n```", "a command that is not run"),
        ("```sh\nls\n```", "the language 'sh'"),
        ("```\nls\n```", "the language ''"),
        ("    ls", "the language ''"),
        ("* in a list\n\n  ```console\n  ls\n  ```", "the language 'console'"),
    ],
)
def test_blocks_without_a_verdict_are_found(text: str, fault: str | None) -> None:
    [block] = blocks_in("page", text)
    assert bool(block.fault) == bool(fault)
    assert (block.fault or "").startswith(fault or "")


def test_comments_before_a_block_are_read() -> None:
    [block] = blocks_in("page", "<!-- tests run: ls -l -->\n```bash\nls\n```")
    assert (block.variant, block.prelude) == ("ls -l", None)
    [block] = blocks_in("page", "<!-- tests prepend: a.py -->\n```python\n1\n```")
    assert (block.variant, block.prelude) == (None, "a.py")


def test_commands_in_text_are_in_a_block_too() -> None:
    """Of the same or another page; capital letters and dots in them stand for anything."""
    shown = "\n".join(block.code for page in PAGES for block in blocks_of(page))
    assert [
        f"{page}: {command}"
        for page in PAGES
        for command in commands_in_text(page)
        if not (is_of_ci(command) or re.search(pattern_of(command), shown))
    ] == []


def commands_in_text(page: str) -> list[str]:
    return [
        child.content
        for token in MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())
        for child in token.children or ()
        if child.type == "code_inline" and COMMAND.match(child.content)
    ]


def is_of_ci(command: str) -> bool:
    program, *words = command.split()
    return program == "make" and bool(targets_of_ci().intersection(words[:1]))


def pattern_of(command: str) -> str:
    anything = re.compile(r"^[A-Z_]+$|^\.\.\.$")
    return r"\s+".join(r".*" if anything.match(w) else re.escape(w) for w in command.split())


def test_a_command_that_is_nowhere_in_a_block_is_found() -> None:
    commands = commands_in_text("README.md")
    assert "make train" in commands
    assert not is_of_ci("make train")
    assert not is_of_ci("make ")
    assert re.search(pattern_of("megatron-dion plan MODEL"), "megatron-dion plan 8B\n")
    assert not re.search(pattern_of("megatron-dion plan MODEL --dp 2"), "megatron-dion plan 8B\n")
