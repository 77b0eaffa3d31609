"""Which checkpoints a folder holds, and which of them are complete.

    DIR/latest_checkpointed_iteration.txt    the tracker: Megatron's note of the newest checkpoint
    DIR/iter_0000100/                        a checkpoint; its metadata.json is written last
    DIR/partial_iter_0000200.5f3a9c01/       a checkpoint that is being written, or never finished
    DIR/replaced_iter_0000100.5f3a9c01/      a checkpoint that a newer one has just replaced

A checkpoint is written under its partial name and renamed when everything is in it. So a process
that is killed at any moment leaves complete checkpoints as they were, and nothing that looks
complete and is not.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dion.checkpointing.errors import CheckpointError, NothingToLoad
from megatron_dion.checkpointing.hashes import written_at

TRACKER = "latest_checkpointed_iteration.txt"
MARKER = "metadata.json"
RELEASE = "release"

_NAME = re.compile(r"iter_(\d{7,})|(?:partial|replaced)_iter_(\d{7,})\.[0-9a-f]+")


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

    def read_tracker(self, tracker: str) -> tuple[int, bool] | None:
        """Iteration and whether it is a release, in place of the tracker's; None elsewhere."""
        if Path(tracker).parent != self.root:
            return None
        return self.iteration or 0, self.iteration is None


def folder_of(root: Path, iteration: int) -> Path:
    """Megatron's name for the checkpoint of an iteration."""
    return root / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration in the name of a checkpoint, complete or not; None in any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1] or match[2]) if match else None


def is_complete(folder: Path) -> bool:
    """Whether the marker, which is written last, is there."""
    try:
        return isinstance(json.loads((folder / MARKER).read_text()), dict)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def complete_iterations(root: Path) -> list[int]:
    """The iterations of complete checkpoints, the latest first."""
    iterations = {n for path in root.iterdir() if (n := iteration_of(path)) is not None}
    return sorted((n for n in iterations if is_complete(folder_of(root, n))), reverse=True)


def unfinished(root: Path) -> list[Path]:
    """Folders of checkpoints that were never finished, the latest iteration first."""
    numbered = [(iteration_of(path), path) for path in root.iterdir()]
    incomplete = [(n, path) for n, path in numbered if n is not None and not is_complete(path)]
    return [path for _, path in sorted(incomplete, reverse=True)]


def leftovers(root: Path) -> Iterator[Path]:
    """Folders that only a save in progress may have."""
    return (
        path
        for path in root.iterdir()
        if _NAME.fullmatch(path.name) and not path.name.startswith("iter")
    )


def settle(root: Path) -> None:
    """Gives complete checkpoints their names where a process was killed before it did.

    Only the run that saves into the folder may call this, before it saves: to any other run the
    folder may be a save in progress. All ranks may call it at once; the first to rename wins.
    """
    with contextlib.suppress(OSError):  # `choose` will pass over what cannot be read or renamed
        for path in list(leftovers(root)):
            target = folder_of(root, iteration_of(path) or 0)
            if is_complete(path) and not is_complete(target):
                with contextlib.suppress(OSError):
                    os.rename(path, target)  # replaces an empty folder, and fails on any other


def tracked(root: Path) -> int | str | None:
    """The tracker's iteration, `release`, or None where it is missing or damaged."""
    try:
        text = (root / TRACKER).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else RELEASE if text == RELEASE else None


def remove_damaged_tracker(root: Path) -> None:
    """Megatron reads the tracker again when it saves, and ends on one that is damaged."""
    if tracked(root) is None:
        (root / TRACKER).unlink(missing_ok=True)


def choose(root: Path, step: int | None = None) -> Choice:
    """Chooses the checkpoint to load: that of a step, or the newest complete one.

    The newest is the one that the tracker names, or one that was saved later and finished after the
    tracker was written: a process can be killed between the two. So a run that went back to an
    older checkpoint goes on from there, whatever later iterations it once had. Without a tracker
    the latest iteration is the newest.

    Raises:
        NothingToLoad: there is no complete checkpoint.
        CheckpointError: the folder cannot be read, or the step has no complete checkpoint.
    """
    try:
        if not root.exists():
            raise NothingToLoad(f"{root} does not exist")
        complete = complete_iterations(root)
        return (
            _choose_newest(root, complete) if step is None else _choose_step(root, step, complete)
        )
    except OSError as error:
        raise CheckpointError(
            f"{root} cannot be read as a folder of checkpoints: {error}"
        ) from error


def _choose_step(root: Path, step: int, complete: list[int]) -> Choice:
    if step in complete:
        return Choice(root, step)
    state = "was never finished" if folder_of(root, step).exists() else "is not there"
    there = ", ".join(map(str, sorted(complete))) or "none"
    raise CheckpointError(
        f"{folder_of(root, step)} {state}: choose another with --ckpt-step (complete: {there})"
    )


def _choose_newest(root: Path, complete: list[int]) -> Choice:
    noted = tracked(root)
    later = [number for number in complete if _is_later_than_tracker(root, number, complete)]
    if noted == RELEASE and not later:
        return Choice(root, None)
    latest = complete[0] if complete else -1
    passed_over = [path for path in unfinished(root) if (iteration_of(path) or 0) > latest]
    if not complete:
        raise _nothing_complete(root, passed_over)
    if later:
        iteration = max(later, key=lambda number: _save_time(root, number))
    else:
        iteration = int(noted) if noted in complete else latest
    remarks = [f"passed over {path}: its writing was never finished" for path in passed_over]
    if iteration != noted:
        state = "is missing or damaged" if noted is None else f"names {noted}"
        remarks.append(
            f"{root / TRACKER} {state}; iteration {iteration}, the newest complete checkpoint, is"
            " taken (--ckpt-step takes another)"
        )
    elif iteration != latest:
        remarks.append(
            f"iteration {iteration} is taken, as {root / TRACKER} says; there are complete"
            f" checkpoints of later iterations, up to {latest} (--ckpt-step takes another)"
        )
    return Choice(root, iteration, tuple(remarks))


def _is_later_than_tracker(root: Path, iteration: int, complete: list[int]) -> bool:
    """Whether a checkpoint was finished after the tracker, and saved after what that names.

    A copy of the folder has the times of its copying, so the manifests say which checkpoint was
    saved later; without manifests the iterations do.
    """
    noted = tracked(root)
    if noted is None:
        return False
    finished = (folder_of(root, iteration) / MARKER).stat().st_mtime_ns
    if finished <= (root / TRACKER).stat().st_mtime_ns:
        return False
    return noted not in complete or _save_time(root, iteration) > _save_time(root, int(noted))


def _save_time(root: Path, iteration: int) -> tuple[float, int]:
    """Sorts checkpoints by when they were saved; those without a manifest by iteration."""
    return written_at(folder_of(root, iteration)) or 0.0, iteration


def _nothing_complete(root: Path, passed_over: list[Path]) -> CheckpointError:
    if passed_over:
        names = ", ".join(path.name for path in passed_over)
        return NothingToLoad(f"{root} holds no complete checkpoint; {names} was never finished")
    if (root / TRACKER).exists():
        return CheckpointError(
            f"{root} has a {TRACKER} and no checkpoint of format torch_dist beside it: correct the"
            " path, or remove the file to start from random weights"
        )
    return NothingToLoad(f"{root} holds no checkpoint")
