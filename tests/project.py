"""The project as a tree of files, and a Python beside it, for tests that write into them."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parent.parent

_CACHES = (".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info")
_MADE = {"build", "data", "dist", "runs"}  # by commands that run in the root


def copy_project(folder: Path) -> None:
    """Copies all files but environments, data, runs and caches into a new folder."""

    def left_out(path: str, names: list[str]) -> set[str]:
        caches = shutil.ignore_patterns(*_CACHES)(path, names)
        return caches | (_MADE if Path(path) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=left_out)


def words_from_make(*words: str) -> list[str]:
    """What make would start Python with for a target, if all was installed; it does not."""
    command = ["make", "--dry-run", "--assume-old=setup", *words]
    # Under `make test` this one would take itself for a part of that, and say so.
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFL"))
    }
    told = subprocess.run(
        command, cwd=ROOT, env=own, capture_output=True, text=True, check=True
    ).stdout
    _python, *started = shlex.split(told.replace("\\\n", ""))
    return started


def link_packages(folder: Path, without: Collection[str] = ()) -> None:
    """Fills a new folder with links to what is installed here, but for the project itself.

    Args:
        folder: for the path of another Python.
        without: names of packages that it shall lack.
    """
    folder.mkdir()
    left_out = {"megatron_dion", "distutils-precedence.pth", *without}
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        name = path.name.removesuffix(".dist-info").partition("-")[0]
        if name not in left_out and not path.name.startswith("__editable__"):
            (folder / path.name).symlink_to(path)
