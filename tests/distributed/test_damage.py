"""Checkpoints that somebody or something has damaged: an error, and nothing is lost by it."""

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dion.checkpointing.folders import TRACKER, complete_iterations, folder_of
from tests.distributed.tiny_gpt import DION, MODEL, TRAINING, save_in_background
from tests.unit.test_command_line import exit_of_rank
from tests.unit.test_inspect_checkpoint import inspect
from tests.worlds import world

RUN = [
    *MODEL, *TRAINING, *DION, "--num-layers", "2", "--seq-length", "16",
    "--max-position-embeddings", "16", "--train-iters", "8", "--save-interval", "4",
]  # fmt: skip
RANKS = 2
AT_ONCE_OR_ASYNC = pytest.mark.parametrize(
    "flags", [[], pytest.param(["--async-save"], marks=pytest.mark.slow)], ids=["at once", "async"]
)


def run(*flags: str) -> tuple[list[object], str]:
    """Exit codes of all ranks, and what the first one said."""
    everything = world(RANKS).fork(exit_of_rank, [*RUN, *flags])
    return [code for code, _ in everything], str(everything[0][1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 4 and 8."""
    folder = tmp_path_factory.mktemp("whole")
    codes, said = run("--save", str(folder))
    assert codes == [0, 0], said
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoints"))


def newest(folder: Path) -> Path:
    return folder_of(folder, 8)


def damage(checkpoint: Path, kind: str) -> str:
    """Damages a file; returns what is said about it."""
    name, change, said = DAMAGE[kind]
    content = change((checkpoint / name).read_bytes())
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    return said


# A file, its new content, and what the error and the tool that inspects it say.
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "bit": ("__1_0.distcp", lambda old: old[:-9] + bytes([old[-9] ^ 1]) + old[-8:], "has changed"),
    "index": (".metadata", lambda old: old[: len(old) // 2], "the common state in"),
    "missing": ("__1_0.distcp", lambda old: None, "cannot be read (No such file or directory)"),
    "truncated": ("__1_0.distcp", lambda old: old[: len(old) // 2], "has changed since it was"),
    "no index": (".metadata", lambda old: None, "the common state in"),
    "manifest": ("integrity.json", lambda old: b"{", "integrity.json is damaged"),
}
SLOW = list(DAMAGE)[3:]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in DAMAGE]
)
def test_damage_is_an_error_and_nothing_is_lost_by_it(folder: Path, kind: str) -> None:
    named, before = damage(newest(folder), kind), contents(folder)
    codes, said = run("--load", str(folder), "--save", str(folder))
    assert codes == [2, 2], said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {newest(folder)} cannot be used: ")
    assert named in line
    assert "--ckpt-step 4 takes an older one" in line
    code, found = inspect(newest(folder), "--verify")
    assert code == 1
    assert named in found
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_hashes_can_be_left_out(tmp_path: Path) -> None:
    run("--no-checkpoint-hashes", "--save", str(tmp_path))
    assert not (newest(tmp_path) / "integrity.json").exists()
    codes, said = run("--load", str(tmp_path), "--ckpt-step", "4")
    assert codes == [0, 0], said
    assert "was saved without hashes: its files were not checked" in said
    code, told = inspect(newest(tmp_path), "--verify")
    assert code == 0
    assert "changed bytes within a tensor cannot be seen" in told
    damage(newest(tmp_path), "truncated")
    codes, said = run("--load", str(tmp_path))
    assert codes == [2, 2]
    assert f"error: {newest(tmp_path)} cannot be loaded into this run" in said
    assert inspect(newest(tmp_path), "--verify")[0] == 1


def run_with_small_files(limit: int, argv: list[str]) -> tuple[object, str]:
    """On a rank: as on a disk that is full when a file has `limit` bytes; rank 1 only."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save_in_background()
    return exit_of_rank(argv)


@AT_ONCE_OR_ASYNC
def test_file_that_cannot_be_written(folder: Path, flags: list[str]) -> None:
    """The rank that cannot write and the one that can end with one line; the rest is untouched."""
    before = contents(folder)
    argv = [*RUN, "--load", str(folder), "--ckpt-step", "4", "--save", str(folder), *flags]
    everything = world(RANKS).fork(run_with_small_files, 50_000, argv)
    assert [code for code, _ in everything] == [1, 1], everything[0][1][-2000:]
    line = next(line for line in everything[0][1].splitlines() if line.startswith("error: "))
    assert f"the checkpoint {newest(folder)} could not be written: rank 1: " in line
    assert "newest complete checkpoint: of iteration 8" in line
    assert contents(folder) == before


def test_saving_again_replaces_a_checkpoint_at_once(folder: Path) -> None:
    """Iteration 8 is saved by other ranks than before: no file of the old one stays."""
    argv = [*RUN, "--load", str(folder), "--ckpt-step", "4", "--save", str(folder)]
    [(code, said)] = world(1).fork(exit_of_rank, argv)
    assert code == 0, said
    assert complete_iterations(folder) == [8, 4]
    assert not (newest(folder) / "__1_0.distcp").exists()
    assert sorted(path.name for path in folder.iterdir()) == [
        "iter_0000004", "iter_0000008", TRACKER,
    ]  # fmt: skip
    assert inspect(newest(folder), "--verify")[0] == 0


def test_damaged_tracker(folder: Path) -> None:
    """Megatron would end when it saves, and start from random weights when it loads."""
    (folder / TRACKER).write_text("")
    more = "--train-iters 9 --override-opt-param-scheduler --save".split()
    codes, said = run("--load", str(folder), *more, str(folder))
    assert codes == [0, 0], said
    assert f"{TRACKER} is missing or damaged" in said
    assert "at iteration 8\n" in said
    assert complete_iterations(folder)[0] == 9


@pytest.mark.slow
def test_reader_leaves_a_save_in_progress_alone(folder: Path) -> None:
    """A folder of another run's, all of whose files are there, and which it is about to rename."""
    partial = folder / "partial_iter_0000012.00ff"
    shutil.copytree(newest(folder), partial)
    before = contents(folder)
    codes, said = run("--load", str(folder), "--ckpt-step", "4")
    assert codes == [0, 0], said
    assert inspect(folder)[0] == 0
    assert contents(folder) == before


def train_watching_the_marker(argv: list[str]) -> list[list[str]]:
    """On a rank: the files beside the marker of a complete checkpoint when it is written."""
    from megatron.core.dist_checkpointing import serialization

    seen: list[list[str]] = []
    save_config = serialization.save_config

    def watched(config: object, folder: str) -> None:
        seen.append(sorted(path.name for path in Path(folder).iterdir()))
        assert Path(folder).name.startswith("partial_iter_")
        save_config(config, folder)

    serialization.save_config = watched
    save_in_background()
    code, said = exit_of_rank(argv)
    assert code == 0, said
    return seen


@AT_ONCE_OR_ASYNC
def test_marker_is_written_last(tmp_path: Path, flags: list[str]) -> None:
    argv = [*RUN, "--save", str(tmp_path), *flags]
    first, _ = world(RANKS).fork(train_watching_the_marker, argv)
    assert first == [[".metadata", "__0_0.distcp", "__1_0.distcp", "integrity.json"]] * 2
