"""Train a SentencePiece tokenizer with byte fallback, for Megatron's SentencePieceTokenizer.

The same input gives the same bytes on every machine. A second call with the same input and
settings reuses what is there.
"""

import argparse
import io
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_dion_tools.data.files import make_once, read_documents, sha256_of_file
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help=".txt or JSON-lines files")
    add("--json-key", default="text", help="key to train on (default: text)")
    add("--vocab-size", type=int, default=4096, help="pieces (default: 4096)")
    add("--output-prefix", type=Path, required=True, help="writes PREFIX.model and PREFIX.json")


def run(args: argparse.Namespace) -> bool:
    """Train, or reuse what is there; return whether the tokenizer was trained.

    Raises:
        ToolError: The input is faulty or does not yield that many pieces.
    """

    def write(folder: Path) -> Mapping[str, Any]:
        (folder / f"{prefix.name}.model").write_bytes(train(args))
        return {"vocab_size": args.vocab_size}

    prefix: Path = args.output_prefix
    recipe = {
        "inputs": [sha256_of_file(path) for path in args.input],
        "key": args.json_key,
        "vocab_size": args.vocab_size,
        "sentencepiece": version("sentencepiece"),
        "options": TRAINER_OPTIONS,
    }
    made = make_once(prefix.with_name(f"{prefix.name}.json"), recipe, write)
    print(f"tokenizer: {'wrote' if made else 'reusing'} {prefix}.model")
    return made


def train(args: argparse.Namespace) -> bytes:
    """Return a serialized SentencePiece model of all lines of all documents.

    Raises:
        ToolError: SentencePiece refuses, with its reason.
    """
    import sentencepiece

    documents = read_documents(args.input, args.json_key)
    # SentencePiece learns no piece across the end of a line.
    lines = [line for _, text in documents for line in text.splitlines() if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=args.vocab_size,
            minloglevel=ERRORS_ONLY,
            **TRAINER_OPTIONS,
        )
    except RuntimeError as error:
        # Without the place in SentencePiece's own source code.
        reason = " ".join(str(error).split()).rpartition("] ")[2]
        raise ToolError(f"--vocab-size {args.vocab_size}: {reason or error}") from error
    return model.getvalue()
