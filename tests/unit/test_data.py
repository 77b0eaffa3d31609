"""The steps from a text corpus to Megatron's datasets."""

import base64
import importlib
import io
import json
import math
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megatron_dion.megatron import data_checks
from megatron_dion_tools import cli
from megatron_dion_tools.data import corpus
from megatron_dion_tools.data.files import make_once, read_documents, sha256_of_file
from megatron_dion_tools.errors import ToolError
from tests.distributed.tiny_gpt import DION, MODEL, TP2, TRAINING
from tests.worlds import RankError, train, world

# --- Files that are made once


def write_abc(folder: Path) -> Mapping[str, Any]:
    (folder / "data.bin").write_bytes(b"abc")
    return {"bytes": 3}


def write_half(folder: Path) -> Mapping[str, Any]:
    (folder / "data.bin").write_bytes(b"half")
    raise KeyboardInterrupt


def test_files_are_made_again_when_recipe_or_file_changes(tmp_path: Path) -> None:
    manifest = tmp_path / "out" / "data.json"
    assert make_once(manifest, {"size": 3}, write_abc)
    assert json.loads(manifest.read_text())["bytes"] == 3
    assert not make_once(manifest, {"size": 3}, write_half)
    assert make_once(manifest, {"size": 4}, write_abc)
    data = manifest.with_name("data.bin")
    data.write_bytes(b"abd")
    assert make_once(manifest, {"size": 4}, write_abc)
    data.unlink()
    assert make_once(manifest, {"size": 4}, write_abc)
    assert data.read_bytes() == b"abc"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"recipe": {}}', "null"])
def test_damaged_manifest_vouches_for_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    assert make_once(tmp_path / "data.json", {}, write_abc)


def test_interruption_leaves_what_was_there(tmp_path: Path) -> None:
    manifest = tmp_path / "data.json"
    make_once(manifest, {"size": 3}, write_abc)
    with pytest.raises(KeyboardInterrupt):
        make_once(manifest, {"size": 4}, write_half)
    assert not make_once(manifest, {"size": 3}, write_half)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.json"]


# --- Documents


def test_documents_come_in_order_from_text_and_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "one.txt", tmp_path / "two.jsonl"
    text.write_text("first\n\nstill first\n")
    lines.write_text('{"text": "second", "name": "x"}\n\n{"text": "third"}\n')
    documents = list(read_documents([text, lines], "text"))
    places = [f"{text}:1", f"{lines}:1", f"{lines}:3"]
    assert documents == [*zip(places, ["first\n\nstill first\n", "second", "third"], strict=True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "good"}\n{"text": \n', r"input\.jsonl:2: not a document \(Expecting value"),
        (b'{"text": "good"}\n\n{"body": "bad"}\n', r"jsonl:3: .*no object .*text under 'text'"),
        (b'["text"]\n', r"input\.jsonl:1: .*no object of JSON"),
        (b'{"text": 3}\n', r"input\.jsonl:1: .*no object of JSON"),
        (b'{"text": "\xff"}\n', r"input\.jsonl:1: .*can't decode"),
        (b'{"text": "good"}\n{"text": "\\ud800"}\n', r"input\.jsonl:2: .*surrogates not allowed"),
        (b'{"text": ' + b"[" * 200_000, r"input\.jsonl:1: .*recursion"),
        (b'\n{"text": ""}\n', r"there is no text in it"),
    ],
)
def test_faulty_lines_are_told_with_their_place(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(content)
    with pytest.raises(ToolError, match=message):
        list(read_documents([path], "text"))


# --- Corpus

DOCUMENTS = {f"docs/part{i % 3}/page{i}.txt": f"Page {i}: café\n    indented\n" for i in range(60)}
OTHERS = {"docs/conf.py": "x = 1\n", "tests/docs/no.txt": "no\n", "README.txt": "no\n"}


def make_archive(path: Path, texts: Mapping[str, str]) -> corpus.Pin:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"example-1.0/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return corpus.Pin("example", "1.0", sha256_of_file(path))


def split(folder: Path, name: str) -> dict[str, str]:
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return {line["name"]: line["text"] for line in lines}


def test_corpus_is_the_documents_in_two_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from a local archive or, the same, from pip, which is given the pinned hash."""
    archive = tmp_path / "example-1.0.tar.gz"
    pin = make_archive(archive, dict(reversed([*DOCUMENTS.items(), *OTHERS.items()])))

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert requirements == f"example==1.0 --hash=sha256:{pin.sha256}\n"
        shutil.copy(archive, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(corpus.subprocess, "run", pip)
    for source in (archive, None):
        out = tmp_path / str(source is None)
        assert corpus.fetch_corpus(out, source, pin)
        train, validation = split(out, "train"), split(out, "validation")
        assert {**train, **validation} == DOCUMENTS
        assert len(train) + len(validation) == len(DOCUMENTS)
        assert 0 < len(validation) < len(DOCUMENTS) / 4
        assert list(train) == sorted(train)
        assert not corpus.fetch_corpus(out, source, pin)


def test_failed_download_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "WARNING: retrying\nERROR: DO NOT MATCH\n  Expected sha256 a\n       Got b\n"
    failed = subprocess.CompletedProcess([], 1, stderr=stderr)
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ToolError, match=r"failed: DO NOT MATCH Expected sha256 a Got b$"):
        corpus.fetch_corpus(tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("other", "wrong sha256: expected 000, got "),
        ("broken", "not a readable"),
        ("truncated", "not a readable"),
        ("empty", "no docs"),
    ],
)
def test_faulty_archives_are_refused(tmp_path: Path, fault: str, message: str) -> None:
    archive = tmp_path / "example-1.0.tar.gz"
    pin = make_archive(archive, {} if fault == "empty" else DOCUMENTS)
    if fault in ("broken", "truncated"):
        archive.write_bytes(b"no" if fault == "broken" else archive.read_bytes()[:-200])
        pin = pin._replace(sha256=sha256_of_file(archive))
    elif fault == "other":
        pin = pin._replace(sha256="000")
    with pytest.raises(ToolError, match=message):
        corpus.fetch_corpus(tmp_path / "out", archive, pin)
    assert list((tmp_path / "out").iterdir()) == []


# --- Tokenizer and datasets

TEXTS = [f"Document {i}\n  has the café number {i * i}.\n" * (i % 5 + 1) for i in range(40)]
VOCAB_SIZE, EOD = 300, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 40 documents, its tokenizer, and one that knows no end of a document."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": text, "title": text[:10]}) + "\n" for text in TEXTS]
    (folder / "corpus.jsonl").write_text("".join(lines))
    train_tokenizer(folder / "corpus.jsonl", folder / "tokenizer")
    (folder / "vocab.json").write_text('{"word": 5}')
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "endless"),
        vocab_size=60,
        eos_id=-1,
        minloglevel=2,
    )
    return folder


def train_tokenizer(source: Path, prefix: Path, vocab_size: int = VOCAB_SIZE) -> Any:
    words = f"data tokenizer --input {source} --output-prefix {prefix} --vocab-size {vocab_size}"
    args = cli.parse(words.split())
    return args.step(args)


def tokenize(source: Path, prefix: Path, flags: str) -> Any:
    words = f"data preprocess --input {source} --output-prefix {prefix} {flags}"
    args = cli.parse(words.split())
    return args.step(args)


def sentencepiece_flags(folder: Path) -> str:
    kind = "--tokenizer-type SentencePieceTokenizer"
    return f"{kind} --tokenizer-model {folder / 'tokenizer.model'} --append-eod"


@pytest.mark.parametrize(
    "text",
    ["".join(TEXTS), "  two\n\n\tspaces \u00a0ﬁ", "new: Ωμέγα 漢字 🙂", "</s> is text"],
)
def test_decoding_gives_the_text_back(folder: Path, text: str) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert pieces.get_piece_size() == VOCAB_SIZE
    assert [pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()] == [0, 1, 2, 3]
    ids = pieces.encode_as_ids(text)
    assert pieces.unk_id() not in ids
    assert pieces.decode_ids(ids) == text


def test_training_is_deterministic_and_done_once(folder: Path, tmp_path: Path) -> None:
    source = folder / "corpus.jsonl"
    assert train_tokenizer(source, tmp_path / "again")
    made = (tmp_path / "again.model").read_bytes()
    assert made == (folder / "tokenizer.model").read_bytes()
    assert not train_tokenizer(source, tmp_path / "again")
    assert train_tokenizer(source, tmp_path / "again", VOCAB_SIZE - 1)


@pytest.mark.parametrize(
    ("vocab_size", "reason"), [(50_000, "too high"), (100, "smaller than"), (0, "vocab_size")]
)
def test_impossible_vocabulary(folder: Path, tmp_path: Path, vocab_size: int, reason: str) -> None:
    with pytest.raises(ToolError, match=f"--vocab-size {vocab_size}: .*{reason}"):
        train_tokenizer(folder / "corpus.jsonl", tmp_path / "no", vocab_size)
    assert not list(tmp_path.iterdir())


def read_dataset(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[index].tolist() for index in range(len(dataset))]


def test_dataset_holds_the_documents_and_its_description_the_facts(
    folder: Path, tmp_path: Path
) -> None:
    assert tokenize(folder / "corpus.jsonl", tmp_path / "data", sentencepiece_flags(folder))
    documents = read_dataset(tmp_path / "data_text_document")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert [ids[-1] for ids in documents] == [EOD] * len(TEXTS)
    assert [pieces.decode_ids(ids[:-1]) for ids in documents] == TEXTS

    facts = json.loads((tmp_path / "data_text_document.json").read_text())
    ids = np.concatenate([np.array(ids) for ids in documents])
    shares = np.unique(ids, return_counts=True)[1] / ids.size
    entropy = facts.pop("unigram_entropy_nats")
    assert math.isclose(entropy, -np.sum(shares * np.log(shares)))
    assert facts["tokenizer"] == facts["recipe"]["tokenizer"]
    assert {key: facts[key] for key in facts if key not in ("recipe", "files", "tokenizer")} == {
        "vocab_size": VOCAB_SIZE,
        "tokens": ids.size,
        "documents": len(TEXTS),
        "append_eod": True,
    }


def test_dataset_is_made_once(folder: Path, tmp_path: Path) -> None:
    source, flags = folder / "corpus.jsonl", sentencepiece_flags(folder)
    assert tokenize(source, tmp_path / "data", flags)
    assert not tokenize(source, tmp_path / "data", flags)
    assert tokenize(source, tmp_path / "data", flags.replace("--append-eod", ""))
    assert all(EOD not in ids for ids in read_dataset(tmp_path / "data_text_document"))


def test_another_key_is_read_and_empty_documents_are_left_out(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "some.jsonl"
    source.write_text('{"title": ""}\n{"title": "x"}\n{"title": ""}\n')
    tokenize(source, tmp_path / "data", f"{sentencepiece_flags(folder)} --json-key title")
    assert len(read_dataset(tmp_path / "data_title_document")) == 1


NULL = "--tokenizer-type NullTokenizer --vocab-size 9"


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ('{"text": "good"}\nbad\n', "", r"bad\.jsonl:2: not a document"),
        (
            '\n{"text": "a"}\n',
            NULL,
            "l:2: .*refuses 'a'",
        ),
        (
            '{"text": "8 9"}\n',
            NULL,
            "l:1: token 9 is not",
        ),
        ('{"text": "8 -1"}\n', NULL, "l:1: token -1 is"),
        ("{}", "--json-key a/b", "--json-key a/b: files are named after the key"),
        ("{}", "--tokenizer-model absent", "cannot load SentencePieceTokenizer from absent: "),
        (
            "{}",
            "--tokenizer-model {folder}/endless.model",
            r"eod: .*endless\.model has no end",
        ),
        ("{}", "--vocab-file {folder}/vocab.json", "--vocab-file is not used: give"),
        ("{}", "--tokenizer-type NoSuch", "cannot load NoSuch from "),
        ("{}", "--tokenizer-type NullTokenizer", "NullTokenizer needs --vocab-size"),
        ("{}", "--tokenizer-type SFTTokenizer", "SFTTokenizer is not for text: use another"),
        ("{}", "--tokenizer-type TikTokenizer", "TikTokenizer needs the package tiktoken: pip"),
    ],
)
def test_mistakes_leave_nothing(
    folder: Path,
    tmp_path: Path,
    content: str,
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_checks, "find_spec", lambda _: None)
    source = tmp_path / "bad.jsonl"
    source.write_text(content)
    flags = f"{sentencepiece_flags(folder)} {flags.format(folder=folder)}"
    with pytest.raises(ToolError, match=message):
        tokenize(source, tmp_path / "data", flags)
    assert list(tmp_path.iterdir()) == [source]


# Flags of a run of two iterations; with the data and the tokenizer they are whole.
RUN = [*MODEL[: MODEL.index("--mock-data")], *TRAINING, *DION, "--train-iters", "2"]
RUN += ["--make-vocab-size-divisible-by", "8", "--split", "1,0,0"]


def save_hugging_face_tokenizer(folder: Path, vocab_size: int, **tokens: str) -> None:
    """A byte-level tokenizer of Hugging Face's, as its library saves it."""
    tokenizers, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytelevel = tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = bytelevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        TEXTS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["</s>"],
            initial_alphabet=bytelevel.alphabet(),
            show_progress=False,
        ),
    )
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    saved.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def with_store(store: Path, function: Callable[..., Any], *args: Any) -> Any:
    """On a rank: call a function where Hugging Face's library has this store and no network."""
    constants = importlib.import_module("huggingface_hub.constants")  # read the environment once
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(store / "hub"), True
    return function(*args)


def tokenize_all(calls: Sequence[tuple[Path, Path, str]]) -> list[Any]:
    """Whether each call wrote its dataset, or what it was refused with."""
    said = []
    for call in calls:
        try:
            said.append(tokenize(*call))
        except ToolError as error:
            said.append(str(error))
    return said


def test_hugging_face_tokenizers_by_folder_and_by_name(folder: Path, tmp_path: Path) -> None:
    """A tokenizer is the same one in another folder or in the library's store, by its name."""
    one, moved, other, bare = (tmp_path / name for name in ("one", "moved", "other", "bare"))
    save_hugging_face_tokenizer(one, 288, eos_token="</s>")
    save_hugging_face_tokenizer(other, 287, eos_token="</s>")
    save_hugging_face_tokenizer(bare, 288)
    shutil.copytree(one, moved)
    stored = tmp_path / "hub" / "models--some--one"
    shutil.copytree(one, stored / "snapshots" / ("0" * 40))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)

    flags = "--append-eod --tokenizer-type HuggingFaceTokenizer --tokenizer-model"
    names = (one, moved, "some/one", other, one, "some/other", bare)
    source, data = folder / "corpus.jsonl", tmp_path / "data"
    calls = [(source, data, f"{flags} {name}") for name in names]
    [said] = world(1).fork(with_store, tmp_path, tokenize_all, calls)
    assert said[:5] == [True, False, False, True, True]
    assert "cannot load HuggingFaceTokenizer from some/other: " in said[5]
    assert "bare has no end token" in said[6]
    assert not any("\n" in line for line in said[5:])

    run = [*RUN, "--data-path", f"{data}_text_document", *flags.split()[1:]]
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "2"]
    world(1).fork(with_store, tmp_path, train, [*run, str(moved), *save])
    more = f"--load {tmp_path / 'saved'} --train-iters 3 --override-opt-param-scheduler".split()
    world(2).fork(with_store, tmp_path, train, [*run, "some/one", *more, *TP2.split()])
    with pytest.raises(RankError, match="other is not the tokenizer that made the data"):
        world(1).fork(with_store, tmp_path, train, [*run, str(other), *more])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TikTokenizer", "GPTSentencePieceTokenizer", "NullTokenizer"])
def test_other_tokenizers_train(folder: Path, tmp_path: Path, kind: str) -> None:
    if kind == "NullTokenizer":
        source, flags = tmp_path / "numbers.jsonl", "--vocab-size 99"
        source.write_text("".join(f'{{"text": "{i} 7 {i + 1} 9 4"}}\n' for i in range(90)))
    elif kind == "GPTSentencePieceTokenizer":
        source, flags = folder / "corpus.jsonl", f"--tokenizer-model {folder / 'tokenizer.model'}"
    else:
        pytest.importorskip("tiktoken")
        codes = [base64.b64encode(bytes([i])).decode() for i in range(256)]
        words = [{"rank": i, "token_bytes": b, "token_str": ""} for i, b in enumerate(codes)]
        (tmp_path / "words.json").write_text(json.dumps(words))
        source = folder / "corpus.jsonl"
        flags = f"--tokenizer-model {tmp_path / 'words.json'} --vocab-size 1256"
    flags += f" --tokenizer-type {kind}"
    tokenize(source, tmp_path / "data", f"{flags} --append-eod")
    data = str(tmp_path / "data_text_document")
    world(1).train(*RUN, "--data-path", data, *flags.split())
