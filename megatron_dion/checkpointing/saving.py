"""Writes a checkpoint beside the others and gives it its name when everything is in it."""

import contextlib
import functools
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dion.checkpointing import folders, hashes
from megatron_dion.checkpointing.agreement import gather, on_first_rank
from megatron_dion.checkpointing.errors import CheckpointError, SaveError, one_line

# A process that outlived its run may still write into the folder.
_remove = functools.partial(shutil.rmtree, ignore_errors=True)


class Saver:
    """Stands before `megatron.core.dist_checkpointing.save`.

    The order is: data, index, hashes, marker, name; Megatron then writes the tracker.

    Args:
        with_hashes: whether a checkpoint gets a manifest with the SHA-256 of its files.
        when_saved: called on rank 0 when a checkpoint is noticed to be complete, with its folder,
            the bytes of its files, and the seconds since the save began.
    """

    def __init__(self, with_hashes: bool, when_saved: Callable[[Path, int, float], None]) -> None:
        self._with_hashes, self._when_saved = with_hashes, when_saved
        self._token: str | None = None  # of this run

    def save(
        self,
        stock: Callable[..., Any],
        state: dict[str, Any],
        checkpoint_dir: str,
        sharded_strategy: Any = None,
        *,
        async_sharded_save: bool = False,
        async_strategy: str = "mcore",
        verify_integrity: bool = False,
        **options: Any,
    ) -> Any:
        """As `dist_checkpointing.save`, which is `stock`.

        Raises:
            SaveError: on all ranks; complete checkpoints are as they were.
        """
        target, start = Path(checkpoint_dir), time.monotonic()
        with _explained(target):
            if self._token is None:
                self._token = on_first_rank(lambda: _prepare(target.parent))
            partial = target.with_name(f"partial_{target.name}.{self._token}")
            on_first_rank(lambda: partial.mkdir(parents=True))
            request = stock(
                state,
                str(partial),
                sharded_strategy,
                async_sharded_save=True,
                async_strategy=async_strategy if async_sharded_save else "mcore",
                verify_integrity=False,
                **options,
            )

            def finish() -> None:
                _rename(partial, target)
                size = sum(path.stat().st_size for path in target.iterdir())
                self._when_saved(target, size, time.monotonic() - start)

            *steps, write_marker = request.finalize_fns
            if self._with_hashes:
                if (write := request.async_fn) is not None:
                    note = functools.partial(_write_and_hash, write, partial, dist.get_rank())
                    request = request._replace(async_fn=note)
                steps.append(lambda: _write_manifest(partial))
            steps += [write_marker, lambda: on_first_rank(finish)]
            request.finalize_fns[:] = [_explained(target)(step) for step in steps]
            if async_sharded_save:
                return request
            request.execute_sync()
        return None


def _prepare(root: Path) -> str:
    """Removes what killed runs left; returns a token that no process which outlived them has."""
    root.mkdir(parents=True, exist_ok=True)
    folders.settle(root)
    for path in folders.leftovers(root):
        _remove(path)
    if folders.tracked(root) is None:  # Megatron reads it when it saves, and ends on a damaged one
        (root / folders.TRACKER).unlink(missing_ok=True)
    return secrets.token_hex(4)


def _write_and_hash(
    write: Callable[..., Any], folder: Path, rank: int, *args: Any, **options: Any
) -> None:
    """Writes a rank's files, perhaps in a process in the background, and notes their hashes."""
    write(*args, **options)
    with contextlib.suppress(OSError):  # Megatron reports on all ranks what could not be written
        written = hashes.hash_files(folder.glob(f"__{rank}_*"))
        (folder / f"hashes_{rank}.json").write_text(json.dumps(written))


def _write_manifest(folder: Path) -> None:
    """Collects the hashes that all ranks noted, and adds those of all other files."""
    note, mine = folder / f"hashes_{dist.get_rank()}.json", {}
    if note.exists():  # a rank may have had nothing to write
        mine = json.loads(note.read_text())
        note.unlink()
    noted = dict(gather(list(mine.items())))

    def write() -> None:
        others = [path for path in folder.iterdir() if not path.name.startswith("hashes_")]
        rest = hashes.hash_files(path for path in others if path.name not in noted)
        hashes.write_manifest(folder, noted | rest)

    on_first_rank(write)


def _rename(partial: Path, target: Path) -> None:
    """Gives a checkpoint its name, also where an older one of the same iteration has it."""
    replaced = partial.with_name(partial.name.replace("partial_", "replaced_", 1))
    if target.exists() and any(target.iterdir()):
        os.rename(target, replaced)
    os.rename(partial, target)
    _remove(replaced)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turns what goes wrong while a checkpoint is written into one line."""
    try:
        yield
    except SaveError:
        raise
    except (CheckpointException, CheckpointError, OSError, RuntimeError, ValueError) as error:
        if dist.get_rank() == 0:
            for path in list(target.parent.glob(f"partial_{target.name}.*")):
                _remove(path)
        complete = folders.complete_iterations(target.parent)
        raise SaveError(
            f"the checkpoint {target} could not be written: {one_line(error)};"
            f" {shutil.disk_usage(target.parent).free / 1e6:.0f} MB are free there; newest complete"
            f" checkpoint: {f'of iteration {complete[0]}' if complete else 'none'}"
        ) from error
