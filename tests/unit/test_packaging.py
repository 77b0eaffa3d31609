"""What `pip install megatron-dion` would bring, and what the archives hold."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_dion
from tests.project import ROOT, copy_project

EXTRAS = ("data", "run", "docs", "dev")


def requirements(extra: str) -> set[str]:
    found = map(Requirement, requires("megatron-dion") or [])
    return {
        one.name for one in found if one.marker is None or one.marker.evaluate({"extra": extra})
    }


def test_only_its_extra_brings_transformer_engine() -> None:
    for extra in ("", *EXTRAS):
        assert "transformer-engine" not in requirements(extra)
    assert "transformer-engine" in requirements("te")


def test_nothing_brings_apex() -> None:
    # The package index has an unrelated project of that name.
    assert all("apex" not in requirements(extra) for extra in ("", "te", *EXTRAS))


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
    """A folder with a source archive, and the wheel that was built from that."""
    folder = tmp_path_factory.mktemp("packaging")
    sources = folder / "sources"
    copy_project(sources)
    built = folder / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(sources))
    return built


def run(*command: str, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_has_the_package_alone(archives: Path) -> None:
    [wheel] = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [n for n in names if n.endswith(".dist-info/METADATA")]
        description = archive.read(metadata).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"megatron_dion"}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "megatron_dion").rglob("*.py")}
    assert expected <= set(names)
    assert "Description-Content-Type: text/markdown" in description
    assert "# megatron-dion" in description


def test_source_archive_has_what_the_tests_need(archives: Path) -> None:
    [source] = archives.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("benchmarks", "docs", "examples", "studies", "tests", "tools")
    ours = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours <= names
    assert {"CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "pretrain_gpt.py"} <= names


def test_wheel_works_away_from_the_checkout(archives: Path, tmp_path: Path) -> None:
    """In a virtual environment of its own, which borrows torch and Megatron from this one."""
    [wheel] = archives.glob("*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", str(python), "install")
    run(sys.executable, *pip, "--no-deps", "--no-index", str(wheel))
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    command = str(python.with_name("megatron-dion"))
    assert "doctor" in run(command, "--help", cwd=tmp_path)
    assert "--expect-gpus" in run(command, "doctor", "--help", cwd=tmp_path)
    code = "import megatron_dion; print(megatron_dion.__file__, megatron_dion.__version__)"
    file, version = run(str(python), "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert version == megatron_dion.__version__
