"""Train a SentencePiece tokenizer with byte fallback, for Megatron's SentencePieceTokenizer.

The same input gives the same bytes on every machine. A second call with the same input and
settings reuses what is there.
"""

import argparse
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_dion_tools.data.files import (
    is_current,
    read_documents,
    sha256_of_file,
    staged_output,
)
from megatron_dion_tools.errors import ToolError

# BPE counts pairs in integers, so its result depends on neither the thread count nor the order of
# floating-point sums, unlike the unigram model's expectation steps.
#
# Text is kept as it is (no normalisation, every space, bytes for what has no piece), so decoding
# gives back the document: code and tables live on their indentation.
#
# Megatron ends documents with </s> and masks <pad>, which must therefore be a piece of its own.
TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "character_coverage": 0.9999,
    "max_sentence_length": 1 << 20,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "num_threads": 1,
    "hard_vocab_limit": True,
}
ERRORS_ONLY = 2  # SentencePiece's own log level; errors reach us as exceptions as well


def train_tokenizer(
    inputs: Sequence[Path], keys: Sequence[str], vocab_size: int, prefix: Path
) -> bool:
    """Write `{prefix}.model`, `{prefix}.vocab` and the manifest `{prefix}.json`.

    Args:
        inputs: Text or JSON-lines files.
        keys: The keys of the JSON objects to train on.
        vocab_size: Number of pieces, special pieces and the 256 bytes included.
        prefix: Path of the output without an ending.

    Returns:
        False if the right files were there already.

    Raises:
        ToolError: If the input is faulty or does not yield that many pieces.
    """
    manifest = prefix.with_name(f"{prefix.name}.json")
    recipe = {
        "inputs": [sha256_of_file(path) for path in inputs],
        "keys": list(keys),
        "vocab_size": vocab_size,
        "sentencepiece": version("sentencepiece"),
        "options": TRAINER_OPTIONS,
    }
    if is_current(manifest, recipe):
        return False
    model = train_model(read_lines(inputs, keys), vocab_size)
    with staged_output(manifest, recipe) as (folder, facts):
        (folder / f"{prefix.name}.model").write_bytes(model)
        (folder / f"{prefix.name}.vocab").write_text(describe_pieces(model), encoding="utf-8")
        facts["vocab_size"] = vocab_size
    return True


def read_lines(inputs: Sequence[Path], keys: Sequence[str]) -> list[str]:
    """Return the lines of all documents; SentencePiece learns no piece across a line's end."""
    return [
        line
        for document in read_documents(inputs, keys, "reading")
        for text in document.values()
        for line in text.splitlines()
        if line
    ]


def train_model(lines: Sequence[str], vocab_size: int) -> bytes:
    """Return a serialised SentencePiece model of the lines.

    Raises:
        ToolError: If SentencePiece refuses, with its reason.
    """
    import sentencepiece

    if not lines:
        raise ToolError("the input holds no text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=ERRORS_ONLY,
            **TRAINER_OPTIONS,
        )
    except RuntimeError as error:
        raise ToolError(f"cannot train {vocab_size} pieces: {trainer_reason(error)}") from error
    return model.getvalue()


def trainer_reason(error: RuntimeError) -> str:
    """Return SentencePiece's message without the place in its own source code."""
    message = " ".join(str(error).split())
    return message.rpartition("] ")[2] or message


def describe_pieces(model: bytes) -> str:
    """Return the pieces with their scores, one per line, as SentencePiece's own .vocab has them."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    return "".join(
        f"{pieces.id_to_piece(index)}\t{pieces.get_score(index):g}\n"
        for index in range(pieces.get_piece_size())
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, help=".txt or JSON-lines files"
    )
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="keys to train on (default: text)"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces (default: 4096)")
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="writes PREFIX.model, .vocab and .json"
    )


def run(options: argparse.Namespace) -> None:
    """Train, or reuse what is there."""
    made = train_tokenizer(
        options.input, options.json_keys, options.vocab_size, options.output_prefix
    )
    print(f"tokenizer: {'wrote' if made else 'reusing'} {options.output_prefix}.model")
