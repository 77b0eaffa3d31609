import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron_dion_tools.data import tokenizer as tool
from megatron_dion_tools.errors import ToolError

TEXT = "".join(
    f"def function_{i}(value):\n    return value + {i}  # the {word} of the matter\n\n"
    for i in range(40)
    for word in ("heart", "start", "end", "café")
)
VOCAB_SIZE = 340


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": TEXT, "title": "unused"}) + "\n")
    return path


@pytest.fixture
def prefix(tmp_path: Path, corpus: Path) -> Path:
    prefix = tmp_path / "made" / "tokenizer"
    assert tool.train_tokenizer([corpus], ["text"], VOCAB_SIZE, prefix)
    return prefix


@pytest.fixture
def pieces(prefix: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def test_vocabulary_has_the_size_asked_for(
    prefix: Path, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    assert pieces.get_piece_size() == VOCAB_SIZE
    assert len(Path(f"{prefix}.vocab").read_text().splitlines()) == VOCAB_SIZE


def test_special_pieces_differ(pieces: sentencepiece.SentencePieceProcessor) -> None:
    special = [pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()]
    assert special == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "text", [TEXT, "  two\n\n\n\tspaces  ", "unseen: Ωμέγα 漢字 🙂", "</s> is text", "\u00a0ﬁ x²"]
)
def test_decoding_gives_the_text_back(
    pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = pieces.encode_as_ids(text)
    assert pieces.unk_id() not in ids
    assert pieces.decode_ids(ids) == text


def test_training_is_deterministic(tmp_path: Path, corpus: Path, prefix: Path) -> None:
    again = tmp_path / "other place" / "again"
    tool.train_tokenizer([corpus], ["text"], VOCAB_SIZE, again)
    assert Path(f"{again}.model").read_bytes() == Path(f"{prefix}.model").read_bytes()


def test_second_call_reuses_until_the_input_changes(corpus: Path, prefix: Path) -> None:
    assert not tool.train_tokenizer([corpus], ["text"], VOCAB_SIZE, prefix)
    assert tool.train_tokenizer([corpus], ["text"], VOCAB_SIZE - 1, prefix)
    corpus.write_text(json.dumps({"text": TEXT + "more\n"}) + "\n")
    assert tool.train_tokenizer([corpus], ["text"], VOCAB_SIZE - 1, prefix)


@pytest.mark.parametrize(
    ("vocab_size", "reason"), [(50_000, "too high"), (100, "smaller than"), (0, "vocab_size")]
)
def test_impossible_vocabulary(tmp_path: Path, corpus: Path, vocab_size: int, reason: str) -> None:
    with pytest.raises(ToolError, match=f"cannot train {vocab_size} pieces: .*{reason}"):
        tool.train_tokenizer([corpus], ["text"], vocab_size, tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def test_empty_input(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ToolError, match="holds no text"):
        tool.train_tokenizer([tmp_path / "empty.txt"], ["text"], VOCAB_SIZE, tmp_path / "no")


def test_command_line_reports_a_missing_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_dion", "data", "tokenizer"]
    command += ["--input", "absent.jsonl", "--output-prefix", "x"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    expected = "error: absent.jsonl: No such file or directory\n"
    assert finished.stderr == expected
