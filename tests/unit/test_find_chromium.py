"""The script that continuous integration finds or installs a browser with."""

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "find_chromium.sh"


def program(folder: Path, name: str, script: str = "") -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def find(folder: Path) -> subprocess.CompletedProcess[str]:
    """With nothing else on PATH than what is in the folder, as root."""
    program(folder, "id", "echo 0")
    for name in ("env", "sh", "cp", "chmod"):
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return subprocess.run(
        ["/bin/sh", str(SCRIPT)], env={"PATH": str(folder)}, capture_output=True, text=True
    )


def test_browser_on_the_path_is_taken(tmp_path: Path) -> None:
    program(tmp_path, "apt-get", "exit 7")
    path = program(tmp_path, "google-chrome")
    found = find(tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{path}\n", "")


def test_missing_browser_is_installed(tmp_path: Path) -> None:
    path = tmp_path / "chromium"
    install = f'[ "$1" = update ] || {{ cp "$0" {path}; chmod +x {path}; }}; echo "apt-get $*"'
    program(tmp_path, "apt-get", install)
    found = find(tmp_path)
    assert (found.returncode, found.stdout) == (0, f"{path}\n")
    assert "installing the package chromium" in found.stderr
    assert "apt-get install -q -y --no-install-recommends chromium" in found.stderr


def test_failing_installation_says_what_to_do(tmp_path: Path) -> None:
    program(tmp_path, "apt-get", "exit 100")
    found = find(tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert "Install chromium or google-chrome" in found.stderr
