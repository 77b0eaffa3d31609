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
    add("--output-prefix", type=Path, required=True, help="writes PREFIX_KEY_document.*")
    add("--append-eod", action="store_true", help="end each document with the <eod> token")
    add = parser.add_argument_group("tokenizer", "as in the run that will train").add_argument
    add("--tokenizer-type", required=True, help="as in Megatron, e.g. HuggingFaceTokenizer")
    add("--tokenizer-model", help="file, or folder or name of a HuggingFaceTokenizer")
    add("--vocab-file", help="vocabulary file, for tokenizers that have one")
    add("--merge-file", help="merges file, for GPT2BPETokenizer")
    add(
        "--vocab-size",
        type=int,
        help="of NullTokenizer, and of TikTokenizer with its 1000 specials",
    )
    add("--tokenizer-special-tokens", dest="special_tokens", nargs="+", help="more of these")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help="leave out e.g. <s>")
    add("--trust-remote-code", action="store_true", help="run code that comes with a tokenizer")
    add("--tiktoken-pattern", choices=("v1", "v2"), help="how TikTokenizer splits text")
    add("--tiktoken-num-special-tokens", type=int, default=1000, help="default: 1000")
    add("--null-tokenizer-eod-id", type=int, help="end token of NullTokenizer (default: its last)")


def run(args: argparse.Namespace) -> bool:
    """Tokenize, or reuse what is there; return whether the dataset was written.

    Raises:
        ToolError: The input is faulty or has no text, or the tokenizer cannot be built.
    """
    from megatron_dion.megatron.data_checks import has_end_token, identity_of

    if "/" in args.json_key:
        raise ToolError(
            f"--json-key {args.json_key}: files are named after the key, so it cannot have a /:"
            " give the text another key"
        )
    dataset = args.output_prefix.with_name(f"{args.output_prefix.name}_{args.json_key}_document")
    tokenizer = build_tokenizer(args)
    if args.append_eod and not has_end_token(tokenizer):
        raise ToolError(
            f"--append-eod: {args.tokenizer_type} {args.tokenizer_model} has no end token: give it"
            " one, or leave the flag out"
        )
    recipe = {
        "inputs": [sha256_of_file(path) for path in args.input],
        "key": args.json_key,
        "tokenizer": identity_of(tokenizer),
        "append_eod": args.append_eod,
        "megatron_core": version("megatron-core"),
    }
    made = make_once(
        dataset.with_name(f"{dataset.name}.json"),
        recipe,
        lambda folder: {
            "tokenizer": recipe["tokenizer"],
            **write_dataset(args, tokenizer, folder / dataset.name),
        },
    )
    print(f"dataset: {'wrote' if made else 'reusing'} {dataset}.bin and .idx")
    return made


def write_dataset(args: argparse.Namespace, tokenizer: Any, prefix: Path) -> Mapping[str, Any]:
    """Write PREFIX.bin and .idx, and return the facts that training checks and reports."""
    from megatron.core.datasets import indexed_dataset

    size = tokenizer.vocab_size
    builder = indexed_dataset.IndexedDatasetBuilder(
        indexed_dataset.get_bin_path(str(prefix)),
        dtype=indexed_dataset.DType.optimal_dtype(size),
    )
    documents, counts = 0, np.zeros(size, dtype=np.int64)
    end = [tokenizer.eod] if args.append_eod else []
    for place, text in read_documents(args.input, args.json_key):
        try:
            pieces = tokenizer.tokenize(text)
            ids = np.array([*pieces, *end], dtype=np.int64)
        except Exception as error:  # each tokenizer library has exceptions of its own
            raise ToolError(f"{place}: the tokenizer refuses {text[:40]!r}: {error}") from error
        if len(pieces):  # Megatron cannot sample from an empty document
            if wrong := [token for token in (ids.min(), ids.max()) if not 0 <= token < size]:
                raise ToolError(f"{place}: token {wrong[0]} is not in the vocabulary of {size}")
            counts += np.bincount(ids, minlength=size)
            builder.add_document(ids, [ids.size])
            documents += 1
    builder.finalize(indexed_dataset.get_idx_path(str(prefix)))
    shares = counts[counts > 0] / counts.sum()
    return {
        "vocab_size": size,
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
    from megatron_dion.megatron.data_checks import load_tokenizer
    from megatron_dion.megatron.errors import ConfigurationError

    # The padded size belongs to a model's tensor parallel size, which data do not depend on.
    flags = {**vars(TokenizerConfig()), **vars(args), "pad_vocab_size": False}
    try:
        return load_tokenizer(build_tokenizer, argparse.Namespace(**flags))
    except ConfigurationError as error:
        raise ToolError(str(error)) from error
