import os
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron_dion.checkpointing import folders
from megatron_dion.checkpointing.errors import CheckpointError, NothingToLoad
from megatron_dion.checkpointing.hashes import MANIFEST, write_manifest

MARKER_CONTENT = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def make(root: Path, name: str, complete: bool = True) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"data")
    if complete:
        (folder / "metadata.json").write_text(MARKER_CONTENT)
    return folder


def track(root: Path, text: str) -> None:
    (root / folders.TRACKER).write_text(text)


def test_newest_complete_checkpoint_is_chosen(tmp_path: Path) -> None:
    make(tmp_path, "iter_0000004")
    make(tmp_path, "iter_0000012")
    make(tmp_path, "iter_0000008")
    track(tmp_path, "12")
    choice = folders.choose(tmp_path)
    assert choice.folder == tmp_path / "iter_0000012"
    assert choice.remarks == ()


@pytest.mark.parametrize("name", ["iter_0000008", "partial_iter_0000008.00ff"])
def test_unfinished_checkpoint_is_passed_over_with_a_remark(tmp_path: Path, name: str) -> None:
    make(tmp_path, "iter_0000004")
    make(tmp_path, name, complete=False)
    track(tmp_path, "4")
    choice = folders.choose(tmp_path)
    assert choice.iteration == 4
    assert choice.remarks == (f"passed over {tmp_path / name}: its writing was never finished",)


def test_older_unfinished_checkpoints_are_nobodys_business(tmp_path: Path) -> None:
    make(tmp_path, "partial_iter_0000004.00ff", complete=False)
    make(tmp_path, "iter_0000008")
    track(tmp_path, "8")
    assert folders.choose(tmp_path).remarks == ()


def save(root: Path, iteration: int, when: int, finished: int | None = None) -> None:
    """Makes a checkpoint that was saved at one time, with a marker of perhaps another."""
    folder = make(root, f"iter_{iteration:07d}")
    with mock.patch.object(time, "time", return_value=when):
        write_manifest(folder, {})
    written(folder / "metadata.json", when if finished is None else finished)


def written(path: Path, when: int) -> None:
    """Makes a file as old as that many seconds after some moment."""
    os.utime(path, (1_700_000_000 + when,) * 2)


@pytest.mark.parametrize("text", ["", "\x00\x00", "4", None])
def test_tracker_that_is_damaged_or_behind(tmp_path: Path, text: str | None) -> None:
    """A process can be killed between the last file of a checkpoint and the tracker, or in it."""
    for iteration, when in ((4, -1), (8, 1)):
        written(make(tmp_path, f"iter_{iteration:07d}") / "metadata.json", when)
    if text is not None:
        track(tmp_path, text)
        written(tmp_path / folders.TRACKER, 0)
    choice = folders.choose(tmp_path)
    assert choice.iteration == 8
    assert "--ckpt-step takes another" in choice.remarks[0]
    folders.remove_damaged_tracker(tmp_path)
    assert (tmp_path / folders.TRACKER).exists() == (text == "4")


def test_run_that_went_back_goes_on_from_there(tmp_path: Path) -> None:
    """Later iterations that it once had are older than the tracker."""
    for iteration, when in ((100, 1), (500, 5), (150, 6)):
        save(tmp_path, iteration, when)
    track(tmp_path, "150")
    written(tmp_path / folders.TRACKER, 7)
    choice = folders.choose(tmp_path)
    assert choice.iteration == 150
    assert "complete checkpoints of later iterations, up to 500" in choice.remarks[0]
    track(tmp_path, "500")  # killed before the tracker was written
    written(tmp_path / folders.TRACKER, 5)
    assert folders.choose(tmp_path).iteration == 150


@pytest.mark.parametrize("with_manifests", [True, False])
def test_copy_has_the_times_of_its_copying(tmp_path: Path, with_manifests: bool) -> None:
    """The tracker may be copied first, and an older checkpoint last."""
    for iteration, copied in ((10, 9), (20, 8)):
        save(tmp_path, iteration, when=iteration, finished=copied)
        if not with_manifests:
            (folders.folder_of(tmp_path, iteration) / MANIFEST).unlink()
    track(tmp_path, "20")
    written(tmp_path / folders.TRACKER, 7)
    choice = folders.choose(tmp_path)
    assert (choice.iteration, choice.remarks) == (20, ())


def test_chosen_step(tmp_path: Path) -> None:
    make(tmp_path, "iter_0000004")
    make(tmp_path, "iter_0000008")
    make(tmp_path, "iter_0000012", complete=False)
    track(tmp_path, "8")
    assert folders.choose(tmp_path, 4).iteration == 4
    with pytest.raises(CheckpointError, match=r"iter_0000012 was never finished: .*4, 8\)"):
        folders.choose(tmp_path, 12)
    with pytest.raises(CheckpointError, match="iter_0000005 is not there"):
        folders.choose(tmp_path, 5)


def test_release_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, "release")
    track(tmp_path, "release")
    written(tmp_path / folders.TRACKER, 0)
    assert folders.choose(tmp_path).folder == tmp_path / "release"
    written(make(tmp_path, "iter_0000004") / "metadata.json", 1)  # killed before its tracker
    assert folders.choose(tmp_path).iteration == 4


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(NothingToLoad, match="does not exist"):
        folders.choose(tmp_path / "nowhere")
    with pytest.raises(NothingToLoad, match="holds no checkpoint"):
        folders.choose(tmp_path)
    make(tmp_path, "partial_iter_0000004.00ff", complete=False)
    with pytest.raises(NothingToLoad, match=r"partial_iter_0000004\.00ff was never finished"):
        folders.choose(tmp_path)


def test_tracker_without_its_checkpoint_is_a_mistake(tmp_path: Path) -> None:
    track(tmp_path, "100")
    with pytest.raises(
        CheckpointError, match="no checkpoint of format torch_dist beside"
    ) as refusal:
        folders.choose(tmp_path)
    assert not isinstance(refusal.value, NothingToLoad)


def test_finished_but_not_yet_renamed(tmp_path: Path) -> None:
    """A process was killed between the last file and the name, or between two names."""
    make(tmp_path, "partial_iter_0000008.00ff")
    (tmp_path / "iter_0000008").mkdir()  # Megatron makes it before anything is written
    with pytest.raises(NothingToLoad):  # whoever only reads may not rename
        folders.choose(tmp_path)
    folders.settle(tmp_path)
    assert folders.choose(tmp_path).folder == tmp_path / "iter_0000008"
    assert (tmp_path / "iter_0000008" / "__0_0.distcp").exists()
    make(tmp_path, "partial_iter_0000012.00ff")
    make(tmp_path, "replaced_iter_0000012.00ff")
    folders.settle(tmp_path)
    assert folders.choose(tmp_path, 12).iteration == 12


def test_newer_copy_never_overwrites_a_complete_one(tmp_path: Path) -> None:
    old = make(tmp_path, "iter_0000008")
    (old / "__0_0.distcp").write_bytes(b"old")
    make(tmp_path, "partial_iter_0000008.00ff")
    folders.settle(tmp_path)
    assert folders.choose(tmp_path).iteration == 8
    assert (old / "__0_0.distcp").read_bytes() == b"old"
