"""Every code block in README and documentation is run, or says why it is not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documentation.pages import PAGES, Block, blocks_of
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


def test_every_block_is_run_or_says_why_not() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page)]
    assert [f"{block.place}: {block.fault}" for block in blocks if block.fault] == []


def test_continuous_integration_runs_what_is_left_to_it() -> None:
    """Targets of `make` that `.ci/run` names, and those which these need."""
    blocks = [block for page in PAGES for block in blocks_of(page) if block.mark == "ci"]
    commands = {line.partition("#")[0].strip() for b in blocks for line in b.code.splitlines()}
    rules = dict(re.findall(r"^([\w-]+): *([^=\n]*)$", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M))
    targets = named.union(*(rules[target].split() for target in named))
    assert commands <= {f"make {target}" for target in targets}
    assert "make test" in commands


# README is what a user tries first; the other pages take minutes.
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page == "README.md" else pytest.mark.slow)
        for page in PAGES
        if any(block.is_run for block in blocks_of(page))
    ],
)
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
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{project}{os.pathsep}{project / 'tools'}",
    }
    done = subprocess.run(
        [*interpreter, code],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{block.place} ended with {done.returncode}:\n{done.stdout}"
