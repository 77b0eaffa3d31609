"""The container, without an engine to build it: its recipe is linted, its install script is run."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_dion_tools import cli
from tests.project import ROOT, link_packages

INSTALL = ROOT / "docker" / "install.sh"
# Installed here, but not in the Python of the image's base: of the extras data and run.
LACKING = ("sentencepiece", "tensorboard")


def arguments(instruction: str) -> list[str]:
    """What follows an instruction of the Dockerfile, each time."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{instruction} +(.+)", text, re.M)


def test_base_is_pinned_and_can_be_chosen_and_the_user_is_not_root() -> None:
    """The rest of the rules is hadolint's."""
    [base] = [argument for argument in arguments("ARG") if argument.startswith("BASE=")]
    assert re.search(r":[\d.]+-py3$", base)
    assert arguments("FROM") == ["${BASE}"]
    assert arguments("USER")[-1] == "${USER_ID}"


def test_commands_of_the_image_are_ours() -> None:
    [health] = re.findall(r"^    CMD (.+)", (ROOT / "Dockerfile").read_text(), re.M)
    for command in (health, *arguments("CMD")):
        name, *flags = json.loads(command)
        assert name == "megatron-dion"
        assert cli.parse(flags)
    assert "--no-collectives" in health


@pytest.mark.parametrize(
    ("linter", "pattern"),
    [
        ("hadolint --no-color", "Dockerfile"),
        ("shellcheck --norc", "docker/*.sh"),
        ("shellcheck --norc", ".ci/run"),
        ("shellcheck --norc", "tools/*.sh"),
        ("shellcheck --shell=bash", "examples/slurm/*.s*"),
        ("shellcheck --shell=bash", "examples/slurm/*.env"),
    ],
)
def test_linters_have_no_complaint(linter: str, pattern: str) -> None:
    name, flag = linter.split()
    program = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{name} is not installed")
    files = list(ROOT.glob(pattern))
    assert files
    ended = subprocess.run([program, flag, *files], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


def let_into_the_build() -> list[str]:
    """The files and folders that .dockerignore names; everything else stays out."""
    everything, *patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in "#"
    ]
    assert everything == "*"
    return [pattern[1:] for pattern in patterns if pattern.startswith("!")]


def test_nothing_private_is_let_into_the_image() -> None:
    private = {".", ".git", ".venv", ".env", "build", "data", "runs"}
    assert not private & {name.split("/")[0] for name in let_into_the_build()}
    caches = {"**/.*", "**/__pycache__", "**/*.pyc"}
    assert caches <= set((ROOT / ".dockerignore").read_text().splitlines())


def add_wheel(folder: Path, name: str, requirement: str = "") -> None:
    """Puts an empty package into the only place where pip will look."""
    info = f"{name}-99.0.dist-info"
    needs = f"Requires-Dist: {requirement}\n" if requirement else ""
    with zipfile.ZipFile(folder / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n{needs}"
        wheel.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


def install(source: Path, python: Path, wheels: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script; pip has no index, and no settings of this machine."""
    foreign = ("PIP_", "PYTHONPATH")
    environ = {n: value for n, value in os.environ.items() if not n.startswith(foreign)}
    environ |= {
        "PYTHON": str(python),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the value of the isolation
    }
    script = [source / "docker" / "install.sh"]
    return subprocess.run(script, env=environ, capture_output=True, text=True)


@pytest.mark.slow
def test_install_script_adds_and_replaces_nothing(tmp_path: Path) -> None:
    """In a Python with torch and most packages, as the container's: links to those of this one."""
    source, wheels, venv = (tmp_path / name for name in ("source", "wheels", "venv"))
    for name in let_into_the_build():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    link_packages(tmp_path / "packages", LACKING)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    [site] = venv.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(f"{tmp_path / 'packages'}\n")
    wheels.mkdir()

    def version(name: str) -> str:
        asked = f"import importlib.metadata as m; print(m.version({name!r}))"
        command = [venv / "bin" / "python", "-c", asked]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    for name in ("torch", "tensorboard"):
        add_wheel(wheels, name)
    add_wheel(wheels, "sentencepiece", "torch>=99")
    refused = install(source, venv / "bin" / "python", wheels)
    assert refused.returncode != 0
    assert "conflicting dependencies" in refused.stderr
    assert "(constraint) torch" in refused.stdout

    add_wheel(wheels, "sentencepiece")
    ended = install(source, venv / "bin" / "python", wheels)
    assert ended.returncode == 0, ended.stderr
    assert "adding sentencepiece tensorboard" in ended.stdout
    assert "verdict: " in ended.stdout
    assert [version(name) for name in LACKING] == ["99.0", "99.0"]
    for name in ("torch", "megatron-core", "numpy"):
        assert version(name) == importlib.metadata.version(name)
    command = [venv / "bin" / "megatron-dion", "--help"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "doctor" in told.stdout


def test_python_without_torch_is_sent_away(tmp_path: Path) -> None:
    ended = install(ROOT, Path("/bin/false"), tmp_path)
    assert ended.returncode == 1
    assert "has no torch" in ended.stderr
