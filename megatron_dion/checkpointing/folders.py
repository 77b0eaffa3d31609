"""Which checkpoints a folder holds, and which of them are complete.

    DIR/latest_checkpointed_iteration.txt    the tracker: Megatron's note of the newest one
    DIR/iter_0000100/                        a checkpoint; its metadata.json is written last
    DIR/partial_iter_0000200.5f3a9c01/       one that is being written, or that was never finished
    DIR/replaced_iter_0000100.5f3a9c01/      one of which a newer copy has just taken the place

A checkpoint is written under its partial name and renamed when everything is in it. So a process
that is killed at any moment leaves complete checkpoints as they were, and nothing that looks
complete and is not.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dion.checkpointing.errors import CheckpointError, NothingToLoad
from megatron_dion.checkpointing.hashes import written_at

TRACKER = "latest_checkpointed_iteration.txt"
MARKER = "metadata.json"
RELEASE = "release"

_CHECKPOINT = re.compile(r"iter_(\d{7,})")
_LEFTOVER = re.compile(r"(?:partial|replaced)_iter_(\d{7,})\.[0-9a-f]+")


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a run loads.

    Attributes:
        root: the folder of all checkpoints.
        iteration: of the checkpoint; None for a release checkpoint.
        remarks: what a person should know about the choice.
    """

    root: Path
    iteration: int | None
    remarks: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        if self.iteration is None:
            return self.root / RELEASE
        return folder_of(self.root, self.iteration)

    def tracked(self, tracker: str) -> tuple[int, bool] | None:
        """What a tracker should say: iteration, and whether a release; None for another one."""
        if Path(tracker).parent != self.root:
            return None
        return self.iteration or 0, self.iteration is None


def folder_of(root: Path, iteration: int) -> Path:
    """Megatron's name for the checkpoint of an iteration."""
    return root / f"iter_{iteration:07d}"


def partial_folder_of(folder: Path, token: str) -> Path:
    """Where the checkpoint `folder` is written before it is complete.

    Args:
        folder: as `folder_of`.
        token: hexadecimal, other for each run: processes that outlive a killed run must not write
            into the folder of the next one.
    """
    return folder.with_name(f"partial_{folder.name}.{token}")


def is_complete(folder: Path) -> bool:
    """Whether the writing of a checkpoint came to its end.

    Formats without a marker of their end (Megatron's `torch` and `torch_dcp`) count as complete.
    """
    try:
        with (folder / MARKER).open() as file:
            return isinstance(json.load(file), dict)
    except FileNotFoundError:
        return folder.is_dir() and any(folder.glob("mp_rank_*"))
    except (ValueError, NotADirectoryError):
        return False


def complete_iterations(root: Path) -> list[int]:
    """The iterations of complete checkpoints, newest first."""
    found = (_CHECKPOINT.fullmatch(path.name) for path in root.iterdir())
    numbers = sorted((int(match[1]) for match in found if match), reverse=True)
    return [number for number in numbers if is_complete(folder_of(root, number))]


def unfinished(root: Path) -> list[Path]:
    """Folders of checkpoints that were never finished, newest first."""
    found = []
    for path in root.iterdir():
        match = _CHECKPOINT.fullmatch(path.name) or _LEFTOVER.fullmatch(path.name)
        if match and not is_complete(path):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def leftovers(root: Path) -> Iterator[Path]:
    """Folders that only a save in progress may have."""
    return (path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name))


def settle(root: Path) -> None:
    """Gives complete checkpoints their names where a killed process did not come to it.

    For the run that saves there, before it saves: another one would take them from under its hands.
    All of its ranks may call this at once, the first to rename wins.
    """
    with contextlib.suppress(OSError):  # what cannot be read or renamed `choose` will not find
        for path in list(leftovers(root)):
            match = _LEFTOVER.fullmatch(path.name)
            assert match is not None
            target = folder_of(root, int(match[1]))
            if is_complete(path) and not is_complete(target):
                with contextlib.suppress(OSError):
                    os.rename(path, target)  # replaces an empty folder, and fails on any other


def tracked(root: Path) -> int | str | None:
    """The tracker's iteration, `release`, or None where it is missing or not to be read."""
    try:
        text = (root / TRACKER).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    if text == RELEASE:
        return RELEASE
    return int(text) if text.isdecimal() else None


def repair_tracker(root: Path) -> None:
    """Rewrites a tracker that does not name a checkpoint; Megatron reads it when it saves."""
    if not (root / TRACKER).exists() or tracked(root) is not None:
        return
    complete = complete_iterations(root)
    if not complete:
        (root / TRACKER).unlink()
        return
    written = root / f"{TRACKER}.tmp"
    written.write_text(str(complete[0]))
    os.replace(written, root / TRACKER)


def choose(root: Path, step: int | None = None) -> Choice:
    """Chooses the checkpoint to load: that of a step, or the newest complete one.

    The newest is the one that the tracker names, or one that was saved later and finished after the
    tracker was written: a process can be killed between the two. So a run that has gone back to an
    older checkpoint goes on from there, whatever it once had of later iterations. Without a tracker
    it is the one of the latest iteration.

    Raises:
        NothingToLoad: there is no complete checkpoint.
        CheckpointError: the folder cannot be read, or the step has no complete checkpoint.
    """
    try:
        return _choose(root, step)
    except OSError as error:
        raise CheckpointError(
            f"{root} cannot be read as a folder of checkpoints: {error}"
        ) from error


def _choose(root: Path, step: int | None) -> Choice:
    if not root.exists():
        raise NothingToLoad(f"{root} does not exist")
    complete = complete_iterations(root)
    if step is not None:
        return _choose_step(root, step, complete)
    noted = tracked(root)
    passed_over = [path for path in unfinished(root) if not complete or _number(path) > complete[0]]
    chosen = _finished_after_tracker(root, complete)
    if chosen is None and noted == RELEASE:
        return Choice(root, None)
    if not complete:
        raise _nothing_complete(root, passed_over)
    if chosen is None:
        chosen = int(noted) if noted in complete else complete[0]
    remarks = [f"passed over {path}: its writing was never finished" for path in passed_over]
    if chosen != noted:
        what = "is missing or damaged" if noted is None else f"names {_name(noted)}"
        remarks.append(
            f"{root / TRACKER} {what}; iteration {chosen}, the newest complete checkpoint, is taken"
            " (--ckpt-step takes another)"
        )
    elif chosen != complete[0]:
        remarks.append(
            f"iteration {chosen} is taken, as {root / TRACKER} says; there are complete checkpoints"
            f" of later iterations, up to {complete[0]} (--ckpt-step takes another)"
        )
    return Choice(root, chosen, tuple(remarks))


def _finished_after_tracker(root: Path, complete: list[int]) -> int | None:
    """The iteration that was finished last, if that was after the tracker was written.

    A copy of the folder has its files in the order of the copying: what was saved before the
    tracker's checkpoint was never finished after the tracker.
    """
    noted = tracked(root)
    if noted is None:
        return None
    written = (root / TRACKER).stat().st_mtime_ns
    later = [
        ((folder_of(root, number) / MARKER).stat().st_mtime_ns, number)
        for number in complete
        if (folder_of(root, number) / MARKER).exists()
    ]
    when, number = max(later, default=(0, 0))
    if when <= written or (noted in complete and not _is_newer(root, number, int(noted))):
        return None
    return number


def _is_newer(root: Path, number: int, other: int) -> bool:
    """Which of two checkpoints was saved later: their manifests say, or else their iterations."""
    one, two = (written_at(folder_of(root, iteration)) for iteration in (number, other))
    return number > other if one is None or two is None else one > two


def _name(noted: int | str) -> str:
    return f"iteration {noted}" if isinstance(noted, int) else noted


def _choose_step(root: Path, step: int, complete: list[int]) -> Choice:
    if step in complete:
        return Choice(root, step)
    state = "was never finished" if folder_of(root, step).exists() else "is not there"
    there = ", ".join(map(str, sorted(complete))) or "none"
    raise CheckpointError(
        f"{folder_of(root, step)} {state}: choose another with --ckpt-step (complete: {there})"
    )


def _nothing_complete(root: Path, passed_over: list[Path]) -> CheckpointError:
    if passed_over:
        names = ", ".join(path.name for path in passed_over)
        return NothingToLoad(f"{root} holds no complete checkpoint; {names} was never finished")
    if (root / TRACKER).exists():
        return CheckpointError(
            f"{root} has a {TRACKER} and no checkpoint beside it: correct the path, or remove the"
            " file to start from random weights"
        )
    return NothingToLoad(f"{root} holds no checkpoint")


def _number(folder: Path) -> int:
    match = _CHECKPOINT.fullmatch(folder.name) or _LEFTOVER.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def remove(folder: Path) -> None:
    """Removes a folder, also one in which a process that outlived its run still writes."""
    shutil.rmtree(folder, ignore_errors=True)
