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
from pathlib import Path
from typing import NamedTuple

from megatron_dion.checkpointing.errors import CheckpointError, NothingToLoad
from megatron_dion.checkpointing.hashes import written_at

TRACKER = "latest_checkpointed_iteration.txt"
MARKER = "metadata.json"
RELEASE = "release"

_NAME = re.compile(r"iter_(\d{7,})|(?:partial|replaced)_iter_(\d{7,})\.[0-9a-f]+")


class Choice(NamedTuple):
    """The checkpoint that a run loads, and what a person should know about the choice."""

    root: Path
    iteration: int | None  # None for a release checkpoint
    remarks: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        n = self.iteration
        return self.root / RELEASE if n is None else folder_of(self.root, n)

    def read_tracker(self, tracker: str) -> tuple[int, bool] | None:
        """Iteration and whether it is a release, in place of the tracker's; None elsewhere."""
        is_ours = Path(tracker).parent == self.root
        return (self.iteration or 0, self.iteration is None) if is_ours else None


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


def leftovers(root: Path) -> list[Path]:
    """Folders that only a save in progress may have."""
    return [path for path in root.glob("*_iter_*") if iteration_of(path) is not None]


def settle(root: Path) -> None:
    """Gives complete checkpoints their names where a process was killed before it did.

    Only the run that saves into the folder may call this, before it saves: to any other run the
    folder may be a save in progress. All ranks may call it at once; the first to rename wins.
    """
    for path in leftovers(root):
        with contextlib.suppress(OSError):  # `choose` will pass over what cannot be renamed
            target = folder_of(root, iteration_of(path) or 0)
            if is_complete(path) and not is_complete(target):
                os.rename(path, target)  # replaces an empty folder, and fails on any other


def tracked(root: Path) -> int | str | None:
    """The tracker's iteration, `release`, or None where it is missing or damaged."""
    try:
        text = (root / TRACKER).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else RELEASE if text == RELEASE else None


def choose(root: Path, step: int | None = None) -> Choice:
    """Chooses the checkpoint to load: that of a step, or the newest complete one.

    The newest is the one that the tracker names, so that a run can go back to an older one, or the
    last that was finished after the tracker was written: a process can be killed between the two.
    Without a tracker it is the one of the latest iteration.

    Raises:
        NothingToLoad: there is no complete checkpoint.
        CheckpointError: the folder cannot be read, or the step has no complete checkpoint.
    """
    try:
        complete = complete_iterations(root) if root.exists() else []
        noted = tracked(root)
        when = 0 if noted is None else (root / TRACKER).stat().st_mtime_ns
        places = {n: folder_of(root, n) for n in complete}
        written = {n: written_at(place) for n, place in places.items()}
        finished = {n: written[n] or (places[n] / MARKER).stat().st_mtime_ns for n in complete}
        later = [n for n in complete if finished[n] > when]
    except OSError as error:
        raise CheckpointError(
            f"{root} cannot be read as a folder of checkpoints: {error}"
        ) from error
    if step is not None:
        if step in complete:
            return Choice(root, step)
        raise CheckpointError(
            f"{folder_of(root, step)} is not there, or was never finished: choose another with"
            f" --ckpt-step (complete: {', '.join(map(str, sorted(complete))) or 'none'})"
        )
    if noted == RELEASE and not later:
        return Choice(root, None)
    if not complete and (root / TRACKER).exists():
        raise CheckpointError(
            f"{root} has a {TRACKER} and no checkpoint of format torch_dist beside it: correct the"
            " path, or remove the file to start from random weights"
        )
    if not complete:
        raise NothingToLoad(f"{root} holds no complete checkpoint")
    latest = iteration = complete[0]
    if noted in complete:
        iteration = max(later, key=lambda n: (written[n], n), default=int(noted))
    if iteration == noted == latest:
        return Choice(root, iteration)
    state = "is missing or damaged" if noted is None else f"names {noted}"
    remark = (
        f"{root / TRACKER} {state}, and the latest complete checkpoint is of iteration {latest}:"
        f" iteration {iteration} is taken (--ckpt-step takes another)"
    )
    return Choice(root, iteration, (remark,))
