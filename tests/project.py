"""The project as a tree of files, for tests that let others write into it."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent

_NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__"),
    *("build", "data", "dist", "runs", "*.egg-info"),
)


def copy_project(folder: Path) -> None:
    """Copies all files but environments, data, runs and caches into a new folder."""
    shutil.copytree(ROOT, folder, ignore=_NOT_COPIED)
