"""The corpus, its tokenizer and its datasets, as `make train` and convergence cases use them."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TOKENIZER_TYPE = "SentencePieceTokenizer"


class Data(NamedTuple):
    """The folder of the prepared data, and the size of its vocabulary."""

    folder: Path
    vocab_size: int = 4096


def prepare(data: Data) -> None:
    """Fetch the corpus, train the tokenizer and tokenize both splits, or reuse what is there."""
    folder, tokenizer = data.folder, data.folder / "tokenizer"
    run_step("corpus", "--output", folder)
    train = ("tokenizer", "--input", folder / "train.jsonl")
    run_step(*train, "--vocab-size", data.vocab_size, "--output-prefix", tokenizer)
    for split in ("train", "validation"):
        read = ("preprocess", "--input", folder / f"{split}.jsonl", "--append-eod")
        run_step(*read, *_tokenizer_flags(data), "--output-prefix", folder / split)


def run_step(*arguments: object) -> None:
    """Run a step of `megatron-dion data`; if it fails, it has said why, and its status is ours."""
    command = [sys.executable, "-m", "megatron_dion_tools", "data", *map(str, arguments)]
    status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    if status != 0:
        sys.exit(status)


def data_flags(data: Data) -> list[str]:
    """Return the flags of pretrain_gpt.py that name the tokenizer and both splits."""
    flags = _tokenizer_flags(data)
    for flag, split in (("--train-data-path", "train"), ("--valid-data-path", "validation")):
        flags += [flag, str(data.folder / f"{split}_text_document")]
    return flags


def _tokenizer_flags(data: Data) -> list[str]:
    model = data.folder / "tokenizer.model"
    return ["--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", str(model)]
