"""The container, without an engine to build it: its recipe is linted, its install script is run."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dion_tools import cli
from tests.project import link_packages

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTALL = ROOT / "docker" / "install.sh"
HERE = Path(sys.executable).parent


def program(name: str) -> str:
    """Finds a linter beside this Python or on PATH."""
    found = shutil.which(name, path=f"{HERE}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Splits a Dockerfile into names of instructions and what follows them."""
    lines = [line for line in dockerfile.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def arguments(dockerfile: str, instruction: str) -> list[str]:
    return [rest for name, rest in instructions(dockerfile) if name == instruction]


def test_base_is_pinned_and_can_be_chosen_and_the_user_is_not_root() -> None:
    """The rest of the rules is hadolint's."""
    [base] = [rest for rest in arguments(DOCKERFILE, "ARG") if rest.startswith("BASE=")]
    assert re.search(r":[\d.]+-py3$", base)
    assert arguments(DOCKERFILE, "FROM") == ["${BASE}"]
    assert arguments(DOCKERFILE, "USER")[-1] == "${USER_ID}"


def test_hadolint_has_no_complaint() -> None:
    hadolint = [program("hadolint"), "--no-color", ROOT / "Dockerfile"]
    ended = subprocess.run(hadolint, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_commands_of_the_image_are_ours() -> None:
    [health] = arguments(DOCKERFILE, "HEALTHCHECK")
    for command in (health.partition(" CMD ")[2], *arguments(DOCKERFILE, "CMD")):
        name, *flags = json.loads(command)
        assert name == "megatron-dion"
        assert cli.parse(flags)
    assert "--no-collectives" in health


def in_context(path: str) -> bool:
    """Tells whether .dockerignore lets a path into the build: the last line that fits decides."""
    kept = True
    parts = path.split("/")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        expression = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(expression, "/".join(parts[:n])) for n in range(1, len(parts) + 1)):
            kept = line.startswith("!")
    return kept


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        ".ssh/id_ed25519",
        "runs/1/loss.png",
        "build/lib/megatron_dion/run.py",
        "megatron_dion/__pycache__/run.cpython-312.pyc",
        "megatron_dion.egg-info/PKG-INFO",
    ],
)
def test_image_is_built_without(path: str) -> None:
    assert not in_context(path)


@pytest.mark.parametrize(
    "path",
    [
        "LICENSE",
        "pretrain_gpt.py",
        "tools/quick_start.py",
        "examples/quick_start.args",
        "tools/megatron_dion_tools/doctor/command.py",
    ],
)
def test_image_is_built_with(path: str) -> None:
    assert (ROOT / path).is_file()
    assert in_context(path)


def context() -> Iterator[str]:
    """The files that the build would see. A folder that no line lets in is not walked through."""
    for top in ROOT.iterdir():
        if top.is_file():
            names = [top.name]
        elif f"\n!{top.name}" in (ROOT / ".dockerignore").read_text():
            names = [str(path.relative_to(ROOT)) for path in top.rglob("*") if path.is_file()]
        else:
            continue
        yield from filter(in_context, names)


@pytest.mark.parametrize(
    ("flag", "pattern"),
    [
        ("--norc", "docker/*.sh"),
        ("--norc", ".ci/run"),
        ("--norc", "tools/*.sh"),
        ("--shell=bash", "examples/slurm/*.s*"),
        ("--shell=bash", "examples/slurm/*.env"),
    ],
)
def test_shellcheck_has_no_complaint(flag: str, pattern: str) -> None:
    shellcheck = [program("shellcheck"), flag, *ROOT.glob(pattern)]
    ended = subprocess.run(shellcheck, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")


class Base:
    """A Python with torch and most packages, as the container's: links to the ones of this one.

    It lacks two packages, of which `wheels` gets imitations, so that no package index is needed.
    The project is what the build of the image would see.
    """

    LACKING = ("sentencepiece", "tensorboard")  # of the extras data and run

    def __init__(self, folder: Path, without: tuple[str, ...] = LACKING) -> None:
        self.source, self.wheels = folder / "source", folder / "wheels"
        self.packages, self.venv = folder / "packages", folder / "venv"
        self.wheels.mkdir()
        self.python = self.venv / "bin" / "python"
        link_packages(self.packages, without)
        make = [sys.executable, "-m", "venv", "--without-pip", self.venv]
        subprocess.run(make, check=True)
        [site] = self.venv.glob("lib/python*/site-packages")
        (site / "base.pth").write_text(f"{self.packages}\n")
        for name in context():
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.source / name)

    def add_wheel(self, name: str, *requirements: str) -> None:
        """Puts an empty package into the only place where pip will look."""
        info = f"{name}-99.0.dist-info"
        needs = "".join(f"Requires-Dist: {one}\n" for one in requirements)
        with zipfile.ZipFile(self.wheels / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n{needs}"
            wheel.writestr(f"{info}/METADATA", metadata)
            tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            wheel.writestr(f"{info}/WHEEL", tags)
            wheel.writestr(f"{info}/RECORD", "")

    def install(self, python: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs the script of the copied project."""
        # This machine's settings of pip may hold constraints of their own.
        foreign = ("PIP_", "PYTHONPATH")
        environ = {n: value for n, value in os.environ.items() if not n.startswith(foreign)}
        environ |= {
            "PYTHON": str(python or self.python),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the value of the isolation
            "OMP_NUM_THREADS": "1",
        }
        script = [self.source / "docker" / "install.sh"]
        return subprocess.run(script, env=environ, capture_output=True, text=True, check=False)

    def version(self, name: str) -> str:
        asked = f"import importlib.metadata as m; print(m.version({name!r}))"
        answer = subprocess.run([self.python, "-c", asked], capture_output=True, text=True)
        return answer.stdout.strip()


@pytest.mark.slow
def test_install_script_adds_and_replaces_nothing(tmp_path: Path) -> None:
    base = Base(tmp_path)
    for name in Base.LACKING:
        base.add_wheel(name)
    ended = base.install()
    assert ended.returncode == 0, ended.stderr
    assert "adding sentencepiece tensorboard" in ended.stdout
    assert "verdict: " in ended.stdout
    assert [base.version(name) for name in Base.LACKING] == ["99.0", "99.0"]
    for name in ("torch", "megatron-core", "numpy"):
        assert base.version(name) == importlib.metadata.version(name)
    command = [base.venv / "bin" / "megatron-dion", "--help"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "doctor" in told.stdout


@pytest.mark.slow
def test_requirement_of_another_torch_is_refused(tmp_path: Path) -> None:
    base = Base(tmp_path)
    base.add_wheel("torch")
    base.add_wheel("tensorboard")
    base.add_wheel("sentencepiece", "torch>=99")
    ended = base.install()
    assert ended.returncode != 0
    assert "conflicting dependencies" in ended.stderr
    assert "(constraint) torch" in ended.stdout
    assert base.version("torch") == importlib.metadata.version("torch")


@pytest.mark.slow
def test_torch_that_was_replaced_all_the_same_is_noticed(tmp_path: Path) -> None:
    base = Base(tmp_path, without=())
    swap = f"""
[ "$5" = --no-cache-dir ] || exit 0
rm -f {base.packages}/torch-*.dist-info
mkdir -p {base.packages}/torch-9.9.dist-info
printf 'Name: torch\\nVersion: 9.9\\n' >{base.packages}/torch-9.9.dist-info/METADATA
"""
    careless = tmp_path / "careless"
    careless.write_text(f'#!/bin/sh\n{base.python} "$@" || exit\n{swap}')
    careless.chmod(0o755)
    ended = base.install(careless)
    assert ended.returncode == 1
    assert "and is now 9.9" in ended.stderr


def test_python_without_torch_is_sent_away(tmp_path: Path) -> None:
    ended = Base(tmp_path, without=("torch",)).install()
    assert ended.returncode == 1
    assert "has no torch" in ended.stderr
