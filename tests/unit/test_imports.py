"""The direction of imports between folders, read from the source (docs/design.md draws it)."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import ROOT

PACKAGE = ROOT / "megatron_dion"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
# What each folder imports of Megatron and of this project, beside itself. Other modules, those of
# megatron_dion/megatron among them, import anything but the tools.
MAY_IMPORT = {
    "algorithm": (),
    "sharding": ("megatron_dion.algorithm",),
    "checkpointing": ("megatron.core",),
    "optimizer": (
        "megatron_dion.algorithm",
        "megatron_dion.sharding",
        "megatron_dion.checkpointing",
        "megatron.core",
    ),
    "platforms": ("megatron.core", "megatron.training"),
}


def imports_of(source: str, package: str) -> Iterator[str]:
    """The modules that a module imports anywhere, also in functions, by their full names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(name, package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    allowed = MAY_IMPORT.get(path.parts[1], ("megatron", "megatron_dion"))
    allowed = tuple(f"{name}." for name in (*allowed, f"megatron_dion.{path.parts[1]}"))
    for name in imports_of(source, ".".join(path.parent.parts)):
        assert not name.startswith("megatron") or f"{name}.".startswith(allowed), name


def test_programs_import_no_tests() -> None:
    for path in (ROOT / "tools").rglob("*.py"):
        names = imports_of(path.read_text(encoding="utf-8"), "")
        assert not [name for name in names if name.startswith(("tests", "benchmarks"))], path


def test_package_needs_torch_only() -> None:
    """With nothing but the standard library, torch and what torch itself imports."""
    code = (
        "import sys, torch\n"
        "before = {name.partition('.')[0] for name in sys.modules} | sys.stdlib_module_names\n"
        "import megatron_dion\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(after - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["megatron_dion"]), done.stderr
