"""Which checkpoint of a folder is chosen, and what a killed run left of the others."""

import json
import os
from pathlib import Path

import pytest

from megatron_dion.checkpointing import folders, hashes
from megatron_dion.checkpointing.errors import CheckpointError, NothingToLoad

COMPLETE = "__0_0.distcp metadata.json"


def make(root: Path, name: str, files: str = COMPLETE, finished: int = 0) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file in files.split():
        (folder / file).write_text("{}")
        written(folder / file, finished)
    return folder


def track(root: Path, text: str, when: int = 50) -> None:
    (root / folders.TRACKER).write_text(text)
    written(root / folders.TRACKER, when)


def written(path: Path, when: int) -> None:
    """Makes a file as old as that many seconds after some moment."""
    os.utime(path, (1_700_000_000 + when,) * 2)


# Iterations and when they were finished, what the tracker says at 50, and which one is taken.
CHOICES = {
    "plain": ({4: 1, 12: 3, 8: 2}, "12", 12),
    "killed before the tracker": ({4: 1, 8: 60}, "4", 8),
    "killed in the first tracker": ({4: 1}, "", 4),
    "damaged tracker": ({4: 1, 8: 60}, "\x00\x00", 8),
    "no tracker": ({8: 1, 4: 2}, None, 8),
    "went back": ({100: 1, 500: 2, 150: 3}, "150", 150),
    "copied after its tracker": ({20: 61, 10: 62}, "20", 20),
    "what the tracker names is gone": ({4: 1, 8: 2}, "12", 8),
    "release": ({}, "release", None),
    "killed after a release": ({4: 60}, "release", 4),
}


@pytest.mark.parametrize("case", CHOICES)
def test_newest_complete_checkpoint_is_chosen(tmp_path: Path, case: str) -> None:
    complete, tracker, expected = CHOICES[case]
    for iteration, when in complete.items():
        make(tmp_path, f"iter_{iteration:07d}", finished=when)
    # Neither is complete.
    make(tmp_path, "iter_0000900", "__0_0.distcp", finished=99)
    make(tmp_path, "partial_iter_0000901.00ff", "__0_0.distcp", finished=99)
    if tracker is not None:
        track(tmp_path, tracker)
    choice = folders.choose(tmp_path)
    assert choice.iteration == expected
    assert choice.folder.name == ("release" if expected is None else f"iter_{expected:07d}")
    is_plain = case in ("plain", "copied after its tracker", "release")
    assert ["(--ckpt-step takes another)" in line for line in choice.remarks] == [True] * (
        not is_plain
    )


@pytest.mark.parametrize(
    ("finished", "tracker", "expected"),
    [({300: 20, 150: 40}, "150", 150), ({300: 20, 150: 60}, "300", 150)],
    ids=["copied without times", "went back and was killed before the tracker"],
)
def test_a_later_iteration_that_was_left_is_not_taken(
    tmp_path: Path, finished: dict[int, int], tracker: str, expected: int
) -> None:
    """Manifests know when checkpoints were finished; the times of files do not after a copy."""
    for iteration, when in finished.items():
        folder = make(tmp_path, f"iter_{iteration:07d}", finished=99)
        hashes.write_manifest(folder, {})
        manifest = json.loads((folder / hashes.MANIFEST).read_text())
        manifest["written"] = (1_700_000_000 + when) * 10**9
        (folder / hashes.MANIFEST).write_text(json.dumps(manifest))
    track(tmp_path, tracker)
    assert folders.choose(tmp_path).iteration == expected


def test_chosen_step(tmp_path: Path) -> None:
    for iteration in (4, 8):
        make(tmp_path, f"iter_{iteration:07d}")
    track(tmp_path, "8")
    assert folders.choose(tmp_path, 4) == folders.Choice(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"iter_0000012 is not there, or .*\(complete: 4, 8"):
        folders.choose(tmp_path, 12)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(NothingToLoad, match="nowhere holds no complete checkpoint"):
        folders.choose(tmp_path / "nowhere")
    make(tmp_path, "partial_iter_0000004.00ff", "__0_0.distcp")
    with pytest.raises(NothingToLoad, match="holds no complete checkpoint"):
        folders.choose(tmp_path)
    track(tmp_path, "100")  # somebody has removed what it names: to start anew would be a mistake
    with pytest.raises(CheckpointError, match="no checkpoint of format torch_dist") as refusal:
        folders.choose(tmp_path)
    assert not isinstance(refusal.value, NothingToLoad)
    with pytest.raises(CheckpointError, match="cannot be read as a folder of checkpoints"):
        folders.choose(tmp_path / folders.TRACKER)


def test_finished_but_not_yet_renamed(tmp_path: Path) -> None:
    """A process was killed between the last file and the name, or between two names."""
    make(tmp_path, "partial_iter_0000008.00ff")
    (tmp_path / "iter_0000008").mkdir()  # Megatron makes it before anything is written
    with pytest.raises(NothingToLoad):  # whoever only reads may not rename
        folders.choose(tmp_path)
    old = make(tmp_path, "iter_0000004", f"{COMPLETE} old")
    make(tmp_path, "partial_iter_0000004.00ff")
    make(tmp_path, "partial_iter_0000012.00ff")
    make(tmp_path, "replaced_iter_0000012.00ff", f"{COMPLETE} old")
    folders.settle(tmp_path)
    assert folders.complete_iterations(tmp_path) == [12, 8, 4]
    assert (tmp_path / "iter_0000008" / "__0_0.distcp").exists()
    assert (old / "old").exists(), "a complete checkpoint was overwritten"
