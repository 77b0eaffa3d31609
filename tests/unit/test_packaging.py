"""What `pip install megatron-dion` would bring, and what the archives hold."""

import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import megatron_dion
from tests.documentation.pages import blocks_of
from tests.project import ROOT, copy_project, link_packages

EXTRAS = ("data", "run", "docs", "dev")
PACKAGES = {"megatron_dion": ROOT, "megatron_dion_tools": ROOT / "tools"}


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("pyproject.toml", r'^version = "(.+)"'),
        ("CITATION.cff", r"^version: (.+)"),
        ("Dockerfile", r"^ARG VERSION=(.+)"),
    ],
)
def test_version_is_the_same_everywhere(file: str, pattern: str) -> None:
    [version] = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.M)
    assert version == megatron_dion.__version__


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dist`: a wheel, built from a source archive."""
    folder = tmp_path_factory.mktemp("packaging")
    copy_project(folder / "sources")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"))
    run(*build, str(folder / "sources"))
    return folder


def run(*command: str, cwd: Path | None = None) -> str:
    """Runs a command; pip finds nothing but what is there already."""
    foreign = ("PIP_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_has_both_packages_alone(archives: Path) -> None:
    [wheel] = archives.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    files = {
        path.relative_to(folder).as_posix()
        for package, folder in PACKAGES.items()
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == files


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(archives: Path, tmp_path: Path) -> None:
    """pip resolves the requirements against what is installed here: there is no index."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    link_packages(tmp_path / "packages")
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(f"{tmp_path / 'packages'}\n")
    pip = f"{sys.executable} -m pip --disable-pip-version-check --python {python}"
    install, train = (
        b for b in blocks_of("docs/quickstart.md") if b.module == "tests/unit/test_packaging.py"
    )
    assert install.code.startswith("pip install dist/")
    run("bash", "-c", install.code.replace("pip", pip, 1), cwd=archives)

    command = str(python.with_name("megatron-dion"))
    assert "--expect-gpus" in run(command, "doctor", "--help", cwd=tmp_path)
    assert "GiB" in run(command, "plan", "160M", "--dp", "8", "--optimizer", "dion:1/4")
    for package in PACKAGES:
        code = f"import {package}; print({package}.__file__)"
        assert Path(run(str(python), "-c", code, cwd=tmp_path)).is_relative_to(tmp_path)
    assert train.code.startswith("torchrun ")
    code = train.code.replace("torchrun", f"{python} -m torch.distributed.run", 1)
    assert "iteration       10/      10" in run("bash", "-c", code, cwd=tmp_path)
    [wheel] = archives.glob("dist/*.whl")
    run(*shlex.split(pip), "install", f"{wheel}[{','.join(EXTRAS)}]")
    run(*shlex.split(pip), "check")
