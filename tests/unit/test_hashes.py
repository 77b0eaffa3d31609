import json
from pathlib import Path

import pytest

from megatron_dion.checkpointing import hashes
from megatron_dion.checkpointing.errors import CheckpointError
from tests.distributed.nursery import Nursery


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in (("__0_0.distcp", b"one"), ("__1_0.distcp", b"two"), (".metadata", b"x")):
        (tmp_path / name).write_bytes(content)
    names = [path.name for path in tmp_path.iterdir()]
    hashes.write_manifest(tmp_path, hashes.hash_files(tmp_path, names))
    return tmp_path


def test_files_of_a_rank(folder: Path) -> None:
    (folder / "__10_0.distcp").write_bytes(b"ten")
    assert hashes.data_files_of(folder, 1) == ["__1_0.distcp"]


def megatrons_complaint(folder: Path) -> str | None:
    """In the nursery: what Megatron's own check says."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    try:
        verify_integrity_manifest(str(folder))
    except CheckpointingException as error:
        return str(error)
    return None


def test_manifest_is_megatrons(nursery: Nursery, folder: Path) -> None:
    assert nursery.call(megatrons_complaint, folder) is None
    (folder / "__0_0.distcp").write_bytes(b"One")
    assert "__0_0.distcp: hash mismatch" in nursery.call(megatrons_complaint, folder)


def test_whole(folder: Path) -> None:
    manifest = hashes.read_manifest(folder)
    assert manifest is not None
    assert sorted(manifest) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert hashes.damage(folder, manifest) == []


def test_changed_and_missing_files(folder: Path) -> None:
    manifest = hashes.read_manifest(folder)
    assert manifest is not None
    (folder / "__0_0.distcp").write_bytes(b"onE")
    (folder / "__1_0.distcp").unlink()
    changed, missing = sorted(hashes.damage(folder, manifest))
    assert changed == "__0_0.distcp has changed since it was saved (SHA-256)"
    assert missing == "__1_0.distcp cannot be read (No such file or directory)"


def test_no_manifest(tmp_path: Path) -> None:
    assert hashes.read_manifest(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"algorithm": "sha256"}'])
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / hashes.MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"integrity\.json is damaged"):
        hashes.read_manifest(tmp_path)


def test_other_algorithm(tmp_path: Path) -> None:
    (tmp_path / hashes.MANIFEST).write_text(json.dumps({"algorithm": "md5", "files": {}}))
    with pytest.raises(CheckpointError, match="md5, not sha256"):
        hashes.read_manifest(tmp_path)
