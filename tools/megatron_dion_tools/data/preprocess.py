"""Tokenize documents into Megatron's indexed datasets.

Writes PREFIX_KEY_document.bin and .idx for every key, and a .json beside them that tells what they
were made from. The result does not depend on the number of workers. A second call with the same
input and settings reuses what is there.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dion_tools.data.files import (
    is_current,
    read_documents,
    sha256_of_file,
    staged_output,
)
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.terminal import quiet_imports

# Documents handed to the workers at a time: enough to keep them busy, and a bound on memory, which
# an unbounded queue of a large corpus would not have.
BATCH = 4096
CHUNK = 32  # documents per message to a worker

TokenIds = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer flags, named as Megatron names them."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None


def build_tokenizer(choice: TokenizerChoice) -> Any:
    """Return Megatron's own tokenizer for these flags.

    Raises:
        ToolError: If Megatron cannot build it, with its reason.
    """
    with quiet_imports():
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
        from megatron.training.config import TokenizerConfig
    # The padded size belongs to a model's tensor parallel size, which data does not depend on.
    flags = {**vars(TokenizerConfig()), **asdict(choice), "pad_vocab_size": False}
    try:
        return build_tokenizer(argparse.Namespace(**flags))
    except Exception as error:  # each tokenizer library has exceptions of its own
        reason = " ".join(str(error).split())
        raise ToolError(
            f"cannot load {choice.tokenizer_type} from {choice.tokenizer_model}: {reason}"
        ) from error


class Encoder:
    """Turns documents into token ids; what one worker process holds."""

    def __init__(self, choice: TokenizerChoice, append_eod: bool) -> None:
        """Build the tokenizer.

        Args:
            choice: The tokenizer.
            append_eod: Whether each document ends with the tokenizer's end-of-document token.
        """
        self._tokenizer = build_tokenizer(choice)
        self.vocab_size: int = self._tokenizer.vocab_size
        self._end = [self._tokenizer.eod] if append_eod else []

    def encode(self, document: dict[str, str]) -> dict[str, TokenIds]:
        """Return the token ids of each key's text; empty for an empty text."""
        return {key: self._encode_text(text) for key, text in document.items()}

    def _encode_text(self, text: str) -> TokenIds:
        try:
            ids = self._tokenizer.tokenize(text)
        except ValueError as error:
            raise ToolError(f"the tokenizer refuses {text[:40]!r}: {error}") from error
        return np.asarray([*ids, *self._end] if ids else [], dtype=np.int64)


_worker: Encoder  # one per worker process, made by _start_worker


def _start_worker(choice: TokenizerChoice, append_eod: bool) -> None:
    global _worker
    _worker = Encoder(choice, append_eod)


def _encode_in_worker(document: dict[str, str]) -> dict[str, TokenIds]:
    return _worker.encode(document)


@dataclass(frozen=True)
class Settings:
    """What to tokenize, how, and to where."""

    inputs: Sequence[Path]
    keys: Sequence[str]
    tokenizer: TokenizerChoice
    prefix: Path
    append_eod: bool = False
    workers: int = 1

    def dataset(self, key: str) -> Path:
        """Return the path of a key's dataset without an ending, as Megatron names it."""
        return self.prefix.with_name(f"{self.prefix.name}_{key}_document")

    def manifest(self, key: str) -> Path:
        """Return the path of the description beside a key's dataset."""
        dataset = self.dataset(key)
        return dataset.with_name(f"{dataset.name}.json")


def encode_all(
    documents: Iterable[dict[str, str]], settings: Settings
) -> Iterator[dict[str, TokenIds]]:
    """Yield the encoded documents in the order of the input."""
    start = (settings.tokenizer, settings.append_eod)
    if settings.workers == 1:
        yield from map(Encoder(*start).encode, documents)
        return
    # Forked, because importing Megatron anew takes each worker many seconds.
    processes = multiprocessing.get_context("fork")
    with processes.Pool(settings.workers, _start_worker, start) as pool:
        for batch in itertools.batched(documents, BATCH):
            # imap, unlike map, reports the first faulty document whatever the workers' speed.
            yield from pool.imap(_encode_in_worker, batch, chunksize=CHUNK)


class DatasetWriter:
    """Writes one key's dataset and counts its tokens."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Open the dataset.

        Args:
            prefix: Path of the `.bin` and `.idx` files without the ending.
            vocab_size: Number of different token ids; decides the width of an id on disk.
        """
        with quiet_imports():
            from megatron.core.datasets import indexed_dataset
        self._index = indexed_dataset.get_idx_path(str(prefix))
        self._builder = indexed_dataset.IndexedDatasetBuilder(
            indexed_dataset.get_bin_path(str(prefix)),
            dtype=indexed_dataset.DType.optimal_dtype(vocab_size),
        )
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self.documents = 0

    @property
    def tokens(self) -> int:
        """Number of tokens written."""
        return int(self._counts.sum())

    @property
    def unigram_entropy_nats(self) -> float:
        """Entropy of the distribution of tokens: the loss of the best model without context."""
        shares = self._counts[self._counts > 0] / self.tokens
        return float(-(shares * np.log(shares)).sum())

    def add(self, ids: TokenIds) -> None:
        """Append one document; an empty one is left out, as Megatron cannot sample from it."""
        if ids.size == 0:
            return
        np.add.at(self._counts, ids, 1)
        self._builder.add_document(ids, [ids.size])
        self.documents += 1

    def finish(self) -> None:
        """Write the index.

        Raises:
            ToolError: If no document was written.
        """
        self._builder.finalize(self._index)
        if self.documents == 0:
            raise ToolError("the input holds no text, so there is nothing to write")


def preprocess(settings: Settings) -> bool:
    """Write one indexed dataset and its description for each key.

    Args:
        settings: What to tokenize, how, and to where.

    Returns:
        False if the right files were there already.

    Raises:
        ToolError: If the input is faulty or empty, or the tokenizer cannot be built.
    """
    recipes = {key: make_recipe(settings, key) for key in settings.keys}
    if all(is_current(settings.manifest(key), recipe) for key, recipe in recipes.items()):
        return False
    vocab_size = Encoder(settings.tokenizer, settings.append_eod).vocab_size
    with ExitStack() as stack:
        outputs = {
            key: stack.enter_context(staged_output(settings.manifest(key), recipe))
            for key, recipe in recipes.items()
        }
        writers = {
            key: DatasetWriter(folder / settings.dataset(key).name, vocab_size)
            for key, (folder, _) in outputs.items()
        }
        write_datasets(settings, writers)
        for key, (_, facts) in outputs.items():
            facts.update(describe(settings, writers[key], vocab_size))
    return True


def make_recipe(settings: Settings, key: str) -> dict[str, Any]:
    """Return everything that decides the content of a key's dataset."""
    choice = settings.tokenizer
    return {
        "inputs": [sha256_of_file(path) for path in settings.inputs],
        "key": key,
        "tokenizer_type": choice.tokenizer_type,
        "tokenizer_files": [
            sha256_if_file(name)
            for name in (choice.tokenizer_model, choice.vocab_file, choice.merge_file)
        ],
        "vocab_size": choice.vocab_size,
        "append_eod": settings.append_eod,
        "megatron_core": version("megatron-core"),
    }


def sha256_if_file(name: str | None) -> str | None:
    """Return a file's hash; the name itself if it is the name of a model in a library's store."""
    if name is None or not Path(name).is_file():
        return name
    return sha256_of_file(Path(name))


def write_datasets(settings: Settings, writers: dict[str, DatasetWriter]) -> None:
    """Tokenize all documents into the writers."""
    documents = read_documents(settings.inputs, settings.keys, "tokenizing")
    for encoded in encode_all(documents, settings):
        for key, ids in encoded.items():
            writers[key].add(ids)
    for writer in writers.values():
        writer.finish()


def describe(settings: Settings, writer: DatasetWriter, vocab_size: int) -> dict[str, Any]:
    """Return the facts about a dataset that training checks and reports."""
    return {
        "tokenizer_type": settings.tokenizer.tokenizer_type,
        "tokenizer_model_sha256": sha256_if_file(settings.tokenizer.tokenizer_model),
        "vocab_size": vocab_size,
        "tokens": writer.tokens,
        "documents": writer.documents,
        "append_eod": settings.append_eod,
        "unigram_entropy_nats": writer.unigram_entropy_nats,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help=".txt or JSON-lines files")
    add("--json-keys", nargs="+", default=["text"], help="keys to tokenize (default: text)")
    add("--tokenizer-type", required=True, help="as in Megatron, e.g. SentencePieceTokenizer")
    add("--tokenizer-model", help="the tokenizer's model file")
    add("--vocab-file", help="vocabulary file, for tokenizers that have one")
    add("--merge-file", help="merges file, for GPT2BPETokenizer")
    add("--vocab-size", type=int, help="for tokenizers without a vocabulary of their own")
    add("--output-prefix", type=Path, required=True, help="writes PREFIX_KEY_document.*")
    add("--workers", type=int, default=1, help="processes (default: 1)")
    add("--append-eod", action="store_true", help="end each document with the <eod> token")


def settings_from(options: argparse.Namespace) -> Settings:
    """Return the settings of the command line."""
    if options.workers < 1:
        raise ToolError(f"--workers must be at least 1, not {options.workers}")
    choice = TokenizerChoice(
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        vocab_size=options.vocab_size,
    )
    return Settings(
        inputs=options.input,
        keys=options.json_keys,
        tokenizer=choice,
        prefix=options.output_prefix,
        append_eod=options.append_eod,
        workers=options.workers,
    )


def run(options: argparse.Namespace) -> None:
    """Tokenize, or reuse what is there."""
    settings = settings_from(options)
    made = preprocess(settings)
    for key in settings.keys:
        print(f"dataset: {'wrote' if made else 'reusing'} {settings.dataset(key)}.bin and .idx")
