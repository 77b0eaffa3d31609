from pathlib import Path

import pytest

from megatron_dion.checkpointing import hashes
from megatron_dion.checkpointing.errors import CheckpointError
from tests.worlds import in_host


def megatrons_complaint(folder: Path) -> str | None:
    """In the host of the ranks: what Megatron's own check says."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    try:
        verify_integrity_manifest(str(folder))
    except CheckpointingException as error:
        return str(error)
    return None


def test_changed_and_missing_files_in_megatrons_format(tmp_path: Path) -> None:
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (tmp_path / name).write_bytes(b"one")
    assert hashes.read_manifest(tmp_path) is None
    hashes.write_manifest(tmp_path, hashes.hash_files(tmp_path.iterdir()))
    manifest = hashes.read_manifest(tmp_path)
    assert manifest is not None
    assert not list(hashes.damage(tmp_path, manifest))
    assert in_host(megatrons_complaint, tmp_path) is None
    (tmp_path / "__0_0.distcp").write_bytes(b"onE")
    assert "__0_0.distcp: hash mismatch" in in_host(megatrons_complaint, tmp_path)
    (tmp_path / "__1_0.distcp").unlink()
    assert sorted(hashes.damage(tmp_path, manifest)) == [
        "__0_0.distcp has changed since it was saved (SHA-256)",
        "__1_0.distcp cannot be read (No such file or directory)",
    ]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"algorithm": "sha256"}', '{"algorithm": "md5", "files": {}}']
)
def test_manifest_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    (tmp_path / hashes.MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"integrity\.json is damaged"):
        hashes.read_manifest(tmp_path)
