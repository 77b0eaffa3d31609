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

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dion.checkpointing import folders, hashes
from megatron_dion.checkpointing.agreement import gathered, on_first_rank
from megatron_dion.checkpointing.errors import CheckpointError, SaveError, told

# What a checkpoint has beside its tensors; a guess, for large models it is nothing.
_OVERHEAD_BYTES = 1 << 20

# Each rank leaves its hashes for rank 0 in a file of such a name, and takes it away again.
_HASHES_OF_RANK = "hashes_"


class Saver:
    """Stands before `megatron.core.dist_checkpointing.save`.

    Args:
        with_hashes: whether a checkpoint gets a manifest of SHA-256 of its files.
        when_saved: called on rank 0 with a checkpoint's folder when it is complete, the bytes of
            its tensors, and the seconds since it was begun: one that is written in the background
            is noticed to be complete at the end of an iteration.
    """

    def __init__(self, with_hashes: bool, when_saved: Callable[[Path, int, float], None]) -> None:
        self._with_hashes = with_hashes
        self._when_saved = when_saved
        self._token: str | None = None

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
        """As `dist_checkpointing.save`.

        Raises:
            SaveError: on all ranks; complete checkpoints are as they were.
        """
        target = Path(checkpoint_dir)
        start = time.monotonic()
        with _explained(target):
            partial = folders.partial_folder_of(target, self._prepare(target.parent))
            on_first_rank(lambda: partial.mkdir(parents=True))
            size = _check_space(state, partial)

            def finish() -> None:
                _take_place(partial, target)
                self._when_saved(target, size, time.monotonic() - start)

            request = stock(
                state,
                str(partial),
                sharded_strategy,
                async_sharded_save=True,
                async_strategy=async_strategy if async_sharded_save else "mcore",
                verify_integrity=False,
                **options,
            )
            request = self._completed(request, partial, target, finish)
            if async_sharded_save:
                return request
            request.execute_sync()
        return None

    def _prepare(self, root: Path) -> str:
        """Before the first save: removes what killed runs have left; draws this run's token."""
        if self._token is None:

            def clean() -> str:
                root.mkdir(parents=True, exist_ok=True)
                folders.settle(root)
                for path in folders.leftovers(root):
                    folders.remove(path)
                folders.repair_tracker(root)
                return secrets.token_hex(4)

            self._token = on_first_rank(clean)
        return self._token

    def _completed(
        self, request: Any, partial: Path, target: Path, finish: Callable[[], None]
    ) -> Any:
        """The request with what has to happen after the writing, at last `finish` on rank 0.

        Megatron's own last step writes the marker of a complete checkpoint; hashes come before it.
        """
        if self._with_hashes and request.async_fn is not None:
            write = functools.partial(_write_and_hash, request.async_fn, partial, dist.get_rank())
            request = request._replace(async_fn=write)
        *steps, mark = request.finalize_fns
        if self._with_hashes:
            steps.append(functools.partial(_collect_hashes, partial))
        steps += [mark, lambda: on_first_rank(finish)]
        request.finalize_fns[:] = [functools.partial(_explaining, target, step) for step in steps]
        return request


def _write_and_hash(
    write: Callable[..., Any], folder: Path, rank: int, *args: Any, **options: Any
) -> None:
    """Writes a rank's files, in this process or one that works in the background."""
    write(*args, **options)
    # What `write` could not write it has noted, and all ranks will hear of it.
    with contextlib.suppress(OSError):
        found = hashes.hash_files(folder, hashes.data_files_of(folder, rank))
        _hashes_of_rank(folder, rank).write_text(json.dumps(found))


def _collect_hashes(partial: Path) -> None:
    mine = _take_hashes(partial, dist.get_rank())
    found = dict(gathered(list(mine.items())))
    on_first_rank(lambda: _write_manifest(partial, found))


def _hashes_of_rank(folder: Path, rank: int) -> Path:
    return folder / f"{_HASHES_OF_RANK}{rank}.json"


def _take_hashes(folder: Path, rank: int) -> hashes.Hashes:
    path = _hashes_of_rank(folder, rank)
    if not path.exists():  # the rank had nothing to write; or no room, which is told elsewhere
        return {}
    found: hashes.Hashes = json.loads(path.read_text())
    path.unlink()
    return found


def _write_manifest(folder: Path, found: hashes.Hashes) -> None:
    names = [path.name for path in folder.iterdir()]
    rest = [name for name in names if name not in found and not name.startswith(_HASHES_OF_RANK)]
    hashes.write_manifest(folder, found | hashes.hash_files(folder, rest))


def _take_place(partial: Path, target: Path) -> None:
    """Renames, also where an older checkpoint of the same iteration stands."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(partial, target)
        return
    replaced = partial.with_name(partial.name.replace("partial_", "replaced_", 1))
    os.rename(target, replaced)
    os.rename(partial, target)
    folders.remove(replaced)


def _check_space(state: dict[str, Any], folder: Path) -> int:
    """The bytes of all tensors; CheckpointError where the disk has no room for them."""
    numbers = torch.tensor([_bytes_of(state)], device=torch.cuda.current_device())
    dist.all_reduce(numbers)
    size = int(numbers.item())
    needed = size + _OVERHEAD_BYTES

    def check() -> None:
        free = shutil.disk_usage(folder).free
        if free < needed:
            folders.remove(folder)
            raise CheckpointError(f"it takes {needed / 1e6:.0f} MB")

    on_first_rank(check)
    return size


def _bytes_of(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank, and no other, has to save."""
    return sum(
        value.data.numel() * value.data.element_size()
        for value in nested_values(state)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
        and value.data is not None
        and is_main_replica(value.replica_id)
    )


def _explaining(target: Path, step: Callable[[], None]) -> None:
    with _explained(target):
        step()


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turns what goes wrong while a checkpoint is written into one line."""
    try:
        yield
    except SaveError:
        raise
    except (CheckpointException, CheckpointError, OSError, RuntimeError, ValueError) as error:
        if dist.get_rank() == 0:
            for path in folders.leftovers(target.parent):
                if path.name.startswith(f"partial_{target.name}."):
                    folders.remove(path)
        raise SaveError(_explanation(target, error)) from error


def _explanation(target: Path, error: BaseException) -> str:
    complete = folders.complete_iterations(target.parent)
    newest = f"of iteration {complete[0]}" if complete else "none"
    free = shutil.disk_usage(target.parent).free
    return (
        f"the checkpoint {target} could not be written: {told(error)}; {free / 1e6:.0f} MB are"
        f" free there; newest complete checkpoint: {newest}"
    )
