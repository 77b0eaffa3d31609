"""What `pip install megatron-dion` would bring, and what the archives hold."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Collection
from hashlib import sha256
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_dion
from tests.documentation.pages import blocks_of
from tests.project import ROOT, copy_project, link_packages

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
    """A folder with `dist`: a source archive, and the wheel that was built from that.

    The wheel in `tree` was built from the files of `sources` themselves.
    """
    folder = tmp_path_factory.mktemp("packaging")
    sources = folder / "sources"
    copy_project(sources)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", str(folder / "dist"), str(sources))
    run(*build, "--wheel", "--outdir", str(folder / "tree"), str(sources))
    return folder


def run(*command: str, cwd: Path | None = None) -> str:
    done = attempt(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def attempt(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command; pip finds nothing but what is there already."""
    foreign = ("PIP_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_wheel_has_the_package_alone(archives: Path) -> None:
    [wheel] = archives.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [n for n in names if n.endswith(".dist-info/METADATA")]
        description = archive.read(metadata).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"megatron_dion"}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "megatron_dion").rglob("*.py")}
    assert expected <= set(names)
    assert "Description-Content-Type: text/markdown" in description
    assert "# megatron-dion" in description


def hashes(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {n: sha256(archive.read(n)).hexdigest() for n in archive.namelist()}


def test_source_archive_makes_the_wheel_of_the_tree(archives: Path) -> None:
    [of_archive], [of_tree] = archives.glob("dist/*.whl"), archives.glob("tree/*.whl")
    assert of_archive.name == of_tree.name
    assert hashes(of_archive) == hashes(of_tree)


def test_source_archive_has_all_files(archives: Path) -> None:
    """Those who have it train, test and build the documentation as in the repository."""
    [source] = archives.glob("dist/*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    made = ("build", "megatron_dion.egg-info")  # by the builds
    files = (path.relative_to(archives / "sources") for path in walk(archives / "sources"))
    ours = {path.as_posix() for path in files if path.parts[0] not in made}
    assert {"README.md", "Makefile", ".ci/run", "examples/mock.args"} <= ours
    assert ours - names == set()


def walk(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class Python:
    """A new virtual environment, and what the tests run with for pip to find as installed.

    So pip resolves the wheel's requirements as it does everywhere, versions included, against the
    torch and the Megatron that are there; it has no index, so a requirement that nothing fulfils
    fails the installation. What the index would bring today is not tested: gigabytes.
    """

    def __init__(self, folder: Path, without: Collection[str] = ()) -> None:
        venv.create(folder / "venv", symlinks=True)
        self.path = folder / "venv" / "bin" / "python"
        link_packages(folder / "packages", without)
        [packages] = (folder / "venv").glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text(f"{folder / 'packages'}\n")

    @property
    def pip(self) -> str:
        return f"{sys.executable} -m pip --disable-pip-version-check --python {self.path}"


def test_wheel_works_away_from_the_checkout(archives: Path, tmp_path: Path) -> None:
    python = Python(tmp_path)
    [block] = [
        b for b in blocks_of("docs/install.md") if b.module == "tests/unit/test_packaging.py"
    ]
    assert block.code.startswith("pip install dist/")
    run("bash", "-c", block.code.replace("pip", python.pip, 1), cwd=archives)

    command = str(python.path.with_name("megatron-dion"))
    assert "doctor" in run(command, "--help", cwd=tmp_path)
    assert "--expect-gpus" in run(command, "doctor", "--help", cwd=tmp_path)
    code = "import megatron_dion; print(megatron_dion.__file__, megatron_dion.__version__)"
    file, version = run(str(python.path), "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert version == megatron_dion.__version__

    [wheel] = archives.glob("dist/*.whl")
    said = run(*shlex.split(python.pip), "install", f"{wheel}[{','.join(EXTRAS)}]")
    assert "Requirement already satisfied: einops" in said
    run(*shlex.split(python.pip), "check")


@pytest.mark.parametrize("package", ["megatron_core", "einops"])
def test_wheel_is_not_installed_without_what_it_needs(
    archives: Path, tmp_path: Path, package: str
) -> None:
    [wheel] = archives.glob("dist/*.whl")
    pip = shlex.split(Python(tmp_path, without=(package,)).pip)
    done = attempt(*pip, "install", f"{wheel}[run]")
    assert done.returncode != 0
    assert f"No matching distribution found for {package.replace('_', '-')}" in done.stderr


def test_source_archive_is_installed(archives: Path, tmp_path: Path) -> None:
    """With the setuptools that are there, as no index could bring others."""
    python = Python(tmp_path)
    [source] = archives.glob("dist/*.tar.gz")
    run(*shlex.split(python.pip), "install", "--no-build-isolation", str(source))
    command = str(python.path.with_name("megatron-dion"))
    assert "doctor" in run(command, "--help", cwd=tmp_path)
