import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "find_python.sh"

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
        check=False,
    )


@pytest.mark.parametrize(
    "place",
    [
        "path/python3.12",
        "path/python3.14",
        "path/python3",
        "path/python",
        "system/python3.12",
        "home/.pyenv/versions/3.12.4/bin/python3.12",
        "home/miniconda3/envs/mine/bin/python3.12",
    ],
)
def test_interpreter_is_found_anywhere(tmp_path: Path, place: str) -> None:
    make_interpreter(tmp_path / place, GOOD)
    found = find(tmp_path)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).exists()
    assert found.stderr == ""


def test_pyenv_root_and_active_conda_are_searched(tmp_path: Path) -> None:
    make_interpreter(tmp_path / "pyenv root/versions/3.13.0/bin/python3.13", GOOD)
    assert find(tmp_path, PYENV_ROOT=str(tmp_path / "pyenv root")).returncode == 0
    make_interpreter(tmp_path / "conda/bin/python", GOOD)
    assert find(tmp_path, CONDA_PREFIX=str(tmp_path / "conda")).returncode == 0


def test_failing_shim_is_passed_over(tmp_path: Path) -> None:
    make_interpreter(tmp_path / "path/python3.12", SHIM)
    make_interpreter(tmp_path / "home/.pyenv/versions/3.12.4/bin/python3.12", GOOD)
    assert find(tmp_path).returncode == 0


def test_version_3_12_is_preferred(tmp_path: Path) -> None:
    make_interpreter(tmp_path / "path/python3.13", "echo thirteen")
    make_interpreter(tmp_path / "path/python3", "echo three")
    make_interpreter(tmp_path / "system/python3.12", "echo twelve")
    assert find(tmp_path).stdout == "twelve\n"


def test_named_interpreter_comes_first(tmp_path: Path) -> None:
    named = make_interpreter(tmp_path / "elsewhere/mine", "echo named")
    make_interpreter(tmp_path / "path/python3.12", "echo other")
    assert find(tmp_path, PYTHON=str(named)).stdout == "named\n"


def test_named_interpreter_that_will_not_do_is_told(tmp_path: Path) -> None:
    named = make_interpreter(tmp_path / "elsewhere/mine", OLD)
    make_interpreter(tmp_path / "path/python3.12", "echo other")
    found = find(tmp_path, PYTHON=str(named))
    assert found.stdout == "other\n"
    assert f"{named}: is Python 3.9.1" in found.stderr


def test_all_candidates_are_named_when_none_will_do(tmp_path: Path) -> None:
    old = make_interpreter(tmp_path / "path/python3", OLD)
    shim = make_interpreter(tmp_path / "path/python3.12", SHIM)
    silent = make_interpreter(tmp_path / "system/python", "exit 1")
    found = find(tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert f"{old}: is Python 3.9.1, older than 3.12\n" in found.stderr
    assert f"{shim}: pyenv: python3.12: command not found\n" in found.stderr
    assert f"{silent}: fails to run\n" in found.stderr
    assert "Install one of" in found.stderr


def test_nothing_at_all(tmp_path: Path) -> None:
    found = find(tmp_path)
    assert found.returncode == 1
    assert "there is no interpreter" in found.stderr


def test_name_in_python_variable_is_looked_up_on_path(tmp_path: Path) -> None:
    make_interpreter(tmp_path / "path/special", "echo special")
    assert find(tmp_path, PYTHON="special").stdout == "special\n"
