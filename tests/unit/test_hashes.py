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


def test_changed_and_missing_files(folder: Path) -> None:
    manifest = hashes.read_manifest(folder)
    assert manifest is not None
    assert hashes.damage(folder, manifest) == []
    (folder / "__0_0.distcp").write_bytes(b"onE")
    (folder / "__1_0.distcp").unlink()
    changed, missing = sorted(hashes.damage(folder, manifest))
    assert changed == "__0_0.distcp has changed since it was saved (SHA-256)"
    assert missing == "__1_0.distcp cannot be read (No such file or directory)"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", r"integrity\.json is damaged"),
        ("[]", r"integrity\.json is damaged"),
        ('{"algorithm": "sha256"}', r"integrity\.json is damaged"),
        ('{"algorithm": "md5", "files": {}}', "md5, not sha256"),
    ],
)
def test_manifest_that_cannot_be_used(tmp_path: Path, content: str, named: str) -> None:
    assert hashes.read_manifest(tmp_path) is None
    (tmp_path / hashes.MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=named):
        hashes.read_manifest(tmp_path)
