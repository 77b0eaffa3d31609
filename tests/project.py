"""The project as a tree of files, for tests that let others write into it."""

import shutil
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
