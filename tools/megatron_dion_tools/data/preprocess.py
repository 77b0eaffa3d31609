"""Tokenize documents into Megatron's indexed datasets.

Writes PREFIX_KEY_document.bin and .idx, and a .json beside them that tells what they were made
from. A second call with the same input and settings reuses what is there. One process does it:
Megatron-LM's own tools/preprocess_data.py writes datasets of large corpora in the same format.
"""

import argparse
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dion_tools.data.files import make_once, read_documents, sha256_of_file
from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.terminal import quiet_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags; those of the tokenizer are Megatron's."""
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help=".txt or JSON-lines files")
    add("--json-key", default="text", help="key to tokenize (default: text)")
    add("--tokenizer-type", required=True, help="as in Megatron, e.g. SentencePieceTokenizer")
    add("--tokenizer-model", help="the tokenizer's model file")
    add("--vocab-file", help="vocabulary file, for tokenizers that have one")
    add("--merge-file", help="merges file, for GPT2BPETokenizer")
    add("--vocab-size", type=int, help="for tokenizers without a vocabulary of their own")
    add("--output-prefix", type=Path, required=True, help="writes PREFIX_KEY_document.*")
    add("--append-eod", action="store_true", help="end each document with the <eod> token")


def run(args: argparse.Namespace) -> bool:
    """Tokenize, or reuse what is there; return whether the dataset was written.

    Raises:
        ToolError: The input is faulty or has no text, or the tokenizer cannot be built.
    """
    dataset = args.output_prefix.with_name(f"{args.output_prefix.name}_{args.json_key}_document")
    files = (args.tokenizer_model, args.vocab_file, args.merge_file)
    recipe = {
        "inputs": [sha256_of_file(path) for path in args.input],
        "key": args.json_key,
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_files": [_hash_or_name(name) for name in files],
        "vocab_size": args.vocab_size,
        "append_eod": args.append_eod,
        "megatron_core": version("megatron-core"),
    }
    made = make_once(
        dataset.with_name(f"{dataset.name}.json"),
        recipe,
        lambda folder: write_dataset(args, folder / dataset.name),
    )
    print(f"dataset: {'wrote' if made else 'reusing'} {dataset}.bin and .idx")
    return made


def write_dataset(args: argparse.Namespace, prefix: Path) -> Mapping[str, Any]:
    """Write PREFIX.bin and .idx, and return the facts that training checks and reports."""
    tokenizer = build_tokenizer(args)
    with quiet_imports():
        from megatron.core.datasets import indexed_dataset
    builder = indexed_dataset.IndexedDatasetBuilder(
        indexed_dataset.get_bin_path(str(prefix)),
        dtype=indexed_dataset.DType.optimal_dtype(tokenizer.vocab_size),
    )
    documents, counts = 0, np.zeros(tokenizer.vocab_size, dtype=np.int64)
    end = [tokenizer.eod] if args.append_eod else []
    for text in read_documents(args.input, args.json_key):
        try:
            pieces = tokenizer.tokenize(text)
        except ValueError as error:
            raise ToolError(f"the tokenizer refuses {text[:40]!r}: {error}") from error
        if pieces:  # Megatron cannot sample from an empty document
            ids = np.array([*pieces, *end])
            counts += np.bincount(ids, minlength=len(counts))
            builder.add_document(ids, [ids.size])
            documents += 1
    builder.finalize(indexed_dataset.get_idx_path(str(prefix)))
    shares = counts[counts > 0] / counts.sum()
    return {
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_model_sha256": _hash_or_name(args.tokenizer_model),
        "vocab_size": tokenizer.vocab_size,
        "tokens": int(counts.sum()),
        "documents": documents,
        "append_eod": args.append_eod,
        # The loss in nats of the best model that does not look at the context.
        "unigram_entropy_nats": float(-(shares * np.log(shares)).sum()),
    }


def build_tokenizer(args: argparse.Namespace) -> Any:
    """Return Megatron's own tokenizer for its flags.

    Raises:
        ToolError: Megatron cannot build it, with Megatron's reason.
    """
    with quiet_imports():
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
        from megatron.training.config import TokenizerConfig
    # The padded size belongs to a model's tensor parallel size, which data do not depend on.
    flags = {**vars(TokenizerConfig()), **vars(args), "pad_vocab_size": False}
    try:
        return build_tokenizer(argparse.Namespace(**flags))
    except Exception as error:  # each tokenizer library has exceptions of its own
        reason = " ".join(str(error).split())
        raise ToolError(
            f"cannot load {args.tokenizer_type} from {args.tokenizer_model}: {reason}"
        ) from error


def _hash_or_name(name: str | None) -> str | None:
    """Return a file's hash, or the name of a tokenizer that is in a library's store."""
    return sha256_of_file(Path(name)) if name is not None and Path(name).is_file() else name
