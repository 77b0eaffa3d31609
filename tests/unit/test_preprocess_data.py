import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dion_tools.data import preprocess as tool
from megatron_dion_tools.data.files import sha256_of_file
from megatron_dion_tools.data.tokenizer import train_tokenizer
from megatron_dion_tools.errors import ToolError

TEXTS = [f"Document {i}\n  has the number {i * i}.\n" * (i % 5 + 1) for i in range(40)]
VOCAB_SIZE = 300
EOD = 2


def write_json_lines(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preprocess")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    documents = [{"text": text, "title": text[:10]} for text in TEXTS]
    return write_json_lines(folder / "corpus.jsonl", documents)


@pytest.fixture(scope="module")
def choice(folder: Path, corpus: Path) -> tool.TokenizerChoice:
    train_tokenizer([corpus], ["text"], VOCAB_SIZE, folder / "tokenizer")
    return tool.TokenizerChoice("SentencePieceTokenizer", str(folder / "tokenizer.model"))


@pytest.fixture
def settings(tmp_path: Path, corpus: Path, choice: tool.TokenizerChoice) -> tool.Settings:
    return tool.Settings([corpus], ["text"], choice, tmp_path / "data", append_eod=True)


def read_dataset(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[index].tolist() for index in range(len(dataset))]


def test_dataset_holds_the_documents(settings: tool.Settings) -> None:
    assert tool.preprocess(settings)
    tokenizer = tool.build_tokenizer(settings.tokenizer)
    documents = read_dataset(settings.dataset("text"))
    assert [ids[-1] for ids in documents] == [EOD] * len(TEXTS)
    assert [tokenizer.detokenize(ids[:-1]) for ids in documents] == TEXTS


def test_tokenizer_has_what_megatron_asks_of_it(choice: tool.TokenizerChoice) -> None:
    tokenizer = tool.build_tokenizer(choice)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (VOCAB_SIZE, EOD, 3)


def test_gpt_sentencepiece_tokenizer_encodes_alike(choice: tool.TokenizerChoice) -> None:
    other = dataclasses.replace(choice, tokenizer_type="GPTSentencePieceTokenizer")
    first, second = tool.build_tokenizer(choice), tool.build_tokenizer(other)
    assert first.tokenize(TEXTS[0]) == second.tokenize(TEXTS[0])
    assert first.eod == second.eod


def test_without_eod(settings: tool.Settings) -> None:
    tool.preprocess(dataclasses.replace(settings, append_eod=False))
    assert all(EOD not in ids for ids in read_dataset(settings.dataset("text")))


def test_bytes_do_not_depend_on_the_workers(
    settings: tool.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "BATCH", 7)  # several batches and messages, the last one short
    monkeypatch.setattr(tool, "CHUNK", 2)
    two = dataclasses.replace(settings, workers=2, prefix=tmp_path / "two")
    tool.preprocess(settings)
    tool.preprocess(two)
    for ending in (".bin", ".idx"):
        one_file = settings.dataset("text").with_suffix(ending)
        assert one_file.read_bytes() == two.dataset("text").with_suffix(ending).read_bytes()


def test_each_key_has_its_dataset(settings: tool.Settings) -> None:
    both = dataclasses.replace(settings, keys=["text", "title"])
    tool.preprocess(both)
    assert len(read_dataset(both.dataset("text"))) == len(TEXTS)
    titles = json.loads(both.manifest("title").read_text())
    assert titles["documents"] == len(TEXTS)
    assert titles["tokens"] < json.loads(both.manifest("text").read_text())["tokens"]


def test_description_tells_what_training_checks(settings: tool.Settings) -> None:
    tool.preprocess(settings)
    facts = json.loads(settings.manifest("text").read_text())
    ids = np.concatenate([np.array(ids) for ids in read_dataset(settings.dataset("text"))])
    shares = np.unique(ids, return_counts=True)[1] / ids.size
    assert facts["tokenizer_type"] == "SentencePieceTokenizer"
    assert facts["tokenizer_model_sha256"] == sha256_of_file(
        Path(str(settings.tokenizer.tokenizer_model))
    )
    assert facts["vocab_size"] == VOCAB_SIZE
    assert facts["tokens"] == ids.size
    assert facts["documents"] == len(TEXTS)
    assert facts["append_eod"] is True
    assert math.isclose(facts["unigram_entropy_nats"], -np.sum(shares * np.log(shares)))


def test_second_call_reuses_until_something_changes(settings: tool.Settings) -> None:
    assert tool.preprocess(settings)
    assert not tool.preprocess(settings)
    assert tool.preprocess(dataclasses.replace(settings, append_eod=False))
    settings.dataset("text").with_suffix(".bin").write_bytes(b"")
    assert tool.preprocess(dataclasses.replace(settings, append_eod=False))


def test_empty_documents_are_left_out(settings: tool.Settings, tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "some.jsonl", [{"text": ""}, {"text": "x"}, {"text": ""}])
    tool.preprocess(dataclasses.replace(settings, inputs=[path]))
    assert len(read_dataset(settings.dataset("text"))) == 1


def test_input_without_text_is_an_error(settings: tool.Settings, tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(ToolError, match="holds no text"):
        tool.preprocess(dataclasses.replace(settings, inputs=[path]))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("workers", [1, 2])
def test_faulty_line_leaves_nothing(settings: tool.Settings, tmp_path: Path, workers: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    with pytest.raises(ToolError, match=r"bad\.jsonl:2: not JSON"):
        tool.preprocess(dataclasses.replace(settings, inputs=[path], workers=workers))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_the_tokenizer_refuses(settings: tool.Settings, workers: int) -> None:
    numbers = tool.TokenizerChoice("NullTokenizer", vocab_size=100)
    faulty = dataclasses.replace(settings, tokenizer=numbers, workers=workers)
    with pytest.raises(ToolError, match="refuses 'Document 0"):
        tool.preprocess(faulty)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("SentencePieceTokenizer", "absent.model"),
        ("SentencePieceTokenizer", None),
        ("SentencePieceTokenizer", __file__),
        ("NoSuchTokenizer", None),
    ],
)
def test_tokenizer_that_cannot_be_loaded(kind: str, model: str | None) -> None:
    with pytest.raises(ToolError, match=f"cannot load {kind} from {model}"):
        tool.build_tokenizer(tool.TokenizerChoice(kind, model))


def test_command_line_reports_a_missing_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_dion", "data", "preprocess"]
    command += ["--input", "absent.jsonl", "--output-prefix", "x"]
    command += ["--tokenizer-type", "NullTokenizer"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    expected = "error: absent.jsonl: No such file or directory\n"
    assert finished.stderr == expected
