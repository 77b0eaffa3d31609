"""The script that finds a Python for `make setup`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import ROOT

SCRIPT = ROOT / "tools" / "find_python.sh"
OLD = 'echo "is Python 3.9.1, older than 3.12"; exit 1'
SHIM = 'echo "pyenv: python3.12: command not found" >&2; echo "more" >&2; exit 127'
GOOD = f'exec "{sys.executable}" "$@"'


def make_interpreter(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def find(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script where nothing of this machine is in sight."""
    return subprocess.run(
        ["/bin/sh", SCRIPT, tmp_path / "system"],
        env={"PATH": str(tmp_path / "path"), "HOME": str(tmp_path / "home"), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("place", "variable"),
    [
        ("path/python3.14", ""),
        ("system/python3.12", ""),
        ("home/miniconda3/envs/mine/bin/python3.12", ""),
        ("pyenv root/versions/3.13.0/bin/python3.13", "PYENV_ROOT=pyenv root"),
        ("conda/bin/python", "CONDA_PREFIX=conda"),
        ("path/special", "PYTHON="),
    ],
)
def test_interpreter_is_found_anywhere(tmp_path: Path, place: str, variable: str) -> None:
    make_interpreter(tmp_path / "path/python3.12", SHIM)
    path = make_interpreter(tmp_path / place, GOOD)
    name, _, folder = variable.partition("=")
    value = str(tmp_path / folder) if folder else path.name
    found = find(tmp_path, **({name: value} if name else {}))
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).exists()


def test_named_interpreter_comes_before_3_12_and_3_12_before_others(tmp_path: Path) -> None:
    named = make_interpreter(tmp_path / "elsewhere/mine", "echo named")
    make_interpreter(tmp_path / "path/python3.13", "echo thirteen")
    make_interpreter(tmp_path / "system/python3.12", "echo twelve")
    assert find(tmp_path, PYTHON=str(named)).stdout == "named\n"
    assert find(tmp_path).stdout == "twelve\n"


def test_all_candidates_are_named_when_none_will_do(tmp_path: Path) -> None:
    assert "there is no interpreter" in find(tmp_path).stderr
    old = make_interpreter(tmp_path / "path/python3", OLD)
    shim = make_interpreter(tmp_path / "path/python3.12", SHIM)
    found = find(tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert f"{old}: is Python 3.9.1, older than 3.12\n" in found.stderr
    assert f"{shim}: pyenv: python3.12: command not found\n" in found.stderr
    assert "Install one of" in found.stderr
