import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megatron_dion_tools.data import corpus as tool
from megatron_dion_tools.data.files import sha256_of_file
from megatron_dion_tools.errors import ToolError

DOCUMENTS = {f"docs/part{i % 3}/page{i}.txt": f"Page {i}: café\n    indented\n" for i in range(60)}
OTHERS = {"docs/conf.py": "x = 1\n", "tests/docs/no.txt": "no\n", "README.txt": "no\n"}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "example-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        # Not sorted, so that the order of the corpus is the tool's doing.
        for name, text in reversed([*DOCUMENTS.items(), *OTHERS.items()]):
            content = text.encode()
            member = tarfile.TarInfo(f"example-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def pin(archive: Path) -> tool.Pin:
    return tool.Pin(package="example", version="1.0", sha256=sha256_of_file(archive))


def read_names(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text().splitlines()]


def test_corpus_holds_exactly_the_documents_in_order(
    tmp_path: Path, archive: Path, pin: tool.Pin
) -> None:
    out = tmp_path / "out"
    assert tool.fetch_corpus(out, pin, archive)
    lines = [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()]
    assert {line["name"]: line["text"] for line in lines} == DOCUMENTS
    assert read_names(out / "corpus.jsonl") == sorted(DOCUMENTS)


def test_split_parts_the_documents(tmp_path: Path, archive: Path, pin: tool.Pin) -> None:
    out = tmp_path / "out"
    tool.fetch_corpus(out, pin, archive)
    train, validation = read_names(out / "train.jsonl"), read_names(out / "validation.jsonl")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert 0 < len(validation) < len(DOCUMENTS) / 4


def test_manifest_describes_the_files(tmp_path: Path, archive: Path, pin: tool.Pin) -> None:
    out = tmp_path / "out"
    tool.fetch_corpus(out, pin, archive)
    manifest = json.loads((out / "corpus.json").read_text())
    assert manifest["documents"]["corpus"] == len(DOCUMENTS)
    assert manifest["bytes"] == sum(len(text.encode()) for text in DOCUMENTS.values())
    assert manifest["files"]["train.jsonl"] == sha256_of_file(out / "train.jsonl")


def test_second_call_reuses_and_repairs(tmp_path: Path, archive: Path, pin: tool.Pin) -> None:
    out = tmp_path / "out"
    tool.fetch_corpus(out, pin, archive)
    before = sha256_of_file(out / "train.jsonl")
    assert not tool.fetch_corpus(out, pin, archive)
    (out / "train.jsonl").write_text("damaged")
    assert tool.fetch_corpus(out, pin, archive)
    assert sha256_of_file(out / "train.jsonl") == before


def test_wrong_hash_names_both_and_writes_nothing(
    tmp_path: Path, archive: Path, pin: tool.Pin
) -> None:
    wrong = dataclasses.replace(pin, sha256="0" * 64)
    with pytest.raises(ToolError, match=f"expected {'0' * 64}, found {pin.sha256}"):
        tool.fetch_corpus(tmp_path / "out", wrong, archive)
    assert not (tmp_path / "out").exists()


def test_unreadable_archive(tmp_path: Path, pin: tool.Pin) -> None:
    path = tmp_path / "broken.tar.gz"
    path.write_bytes(b"no archive")
    broken = dataclasses.replace(pin, sha256=sha256_of_file(path))
    with pytest.raises(ToolError, match="not a readable"):
        tool.fetch_corpus(tmp_path / "out", broken, path)


def test_truncated_archive(tmp_path: Path, archive: Path, pin: tool.Pin) -> None:
    path = tmp_path / "short.tar.gz"
    path.write_bytes(archive.read_bytes()[:-200])
    short = dataclasses.replace(pin, sha256=sha256_of_file(path))
    with pytest.raises(ToolError, match="not a readable"):
        tool.fetch_corpus(tmp_path / "out", short, path)


def test_archive_without_documents(tmp_path: Path, pin: tool.Pin) -> None:
    path = tmp_path / "empty.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    empty = dataclasses.replace(pin, sha256=sha256_of_file(path))
    with pytest.raises(ToolError, match="no docs"):
        tool.fetch_corpus(tmp_path / "out", empty, path)


def test_download_asks_pip_for_the_pinned_hash(
    tmp_path: Path, archive: Path, pin: tool.Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        requirements = Path(command[command.index("-r") + 1])
        assert requirements.read_text() == f"example==1.0 --hash=sha256:{pin.sha256}\n"
        shutil.copy(archive, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(tool.subprocess, "run", fake_pip)
    assert tool.fetch_corpus(tmp_path / "out", pin)
    assert read_names(tmp_path / "out" / "corpus.jsonl") == sorted(DOCUMENTS)


def test_failed_download_gives_the_reason(
    tmp_path: Path, pin: tool.Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        stderr = "WARNING: retrying\nERROR: DO NOT MATCH\n  Expected sha256 a\n       Got b\n"
        return subprocess.CompletedProcess(command, 1, stderr=stderr)

    monkeypatch.setattr(tool.subprocess, "run", failing_pip)
    with pytest.raises(ToolError, match=r"failed: DO NOT MATCH Expected sha256 a Got b$"):
        tool.fetch_corpus(tmp_path / "out", pin)


def test_command_line_refuses_another_archive(tmp_path: Path, archive: Path) -> None:
    command = [sys.executable, "-m", "megatron_dion", "data", "corpus"]
    command += ["--output", str(tmp_path / "out")]
    finished = subprocess.run(
        [*command, "--archive", str(archive)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
