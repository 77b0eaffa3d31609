"""The corpus, its tokenizer and its datasets, as `make train`, studies and cases use them."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TOKENIZER_TYPE = "SentencePieceTokenizer"
VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Data:
    """Where the prepared data is, and the size of its vocabulary."""

    folder: Path
    vocab_size: int = VOCAB_SIZE

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's path without an ending."""
        return self.folder / "tokenizer"

    @property
    def tokenizer_model(self) -> Path:
        """The tokenizer's model file."""
        return self.folder / "tokenizer.model"

    def text(self, split: str) -> Path:
        """The documents of `train` or `validation`."""
        return self.folder / f"{split}.jsonl"

    def dataset(self, split: str) -> Path:
        """The indexed dataset of `train` or `validation`, without an ending."""
        return self.folder / f"{split}_text_document"


def data_with_vocabulary(vocab_size: int) -> Data:
    """The corpus with a tokenizer of another size, in `data` of the working folder."""
    return Data(Path("data", f"vocab-{vocab_size}"), vocab_size)


def prepare(data: Data) -> None:
    """Fetch the corpus, train the tokenizer and tokenize both splits, or reuse what is there."""
    run_step("corpus", "--output", data.folder)
    run_step(
        *("tokenizer", "--input", data.text("train")),
        *("--vocab-size", data.vocab_size, "--output-prefix", data.tokenizer),
    )
    for split in ("train", "validation"):
        run_step(
            *("preprocess", "--input", data.text(split), "--append-eod"),
            *("--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", data.tokenizer_model),
            *("--output-prefix", data.folder / split),
        )


def run_step(name: str, *arguments: object) -> None:
    """Run one step; if it fails, it has said why, and its status becomes ours."""
    command = [sys.executable, "-m", "megatron_dion", "data", name, *map(str, arguments)]
    status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    if status != 0:
        sys.exit(status)


def data_flags(data: Data) -> list[str]:
    """Return the flags that name the tokenizer and both splits."""
    flags = ["--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", str(data.tokenizer_model)]
    flags += ["--train-data-path", str(data.dataset("train"))]
    return [*flags, "--valid-data-path", str(data.dataset("validation"))]
