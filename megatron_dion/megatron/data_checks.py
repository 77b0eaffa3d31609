"""What is checked of data and tokenizer before pretrain_gpt.py trains on them."""

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dion.checkpointing import errors
from megatron_dion.megatron.errors import ConfigurationError, in_one_line, refuse
from megatron_dion.megatron.flags import as_flag

# Of each dataset; more would delay the start of a run.
_TOKENS_CHECKED = 2**27

# Megatron goes on without these packages, to an error that does not name them.
_PACKAGES = {
    "HuggingFaceTokenizer": "transformers",
    "GPT2BPETokenizer": "transformers",
    "TikTokenizer": "tiktoken",
}

# Tokenizers of which one differs from another make other tokens of this text.
_SAMPLE = "The CAFÉ  of Zürich's 12,345\n\tdef f(x): return x != 0.5  # Ωμέγα 漢字 🙂 <s> </s>\n"


def check_data(args: argparse.Namespace) -> None:
    """There are data, their files are whole, and --split leaves no set without documents."""
    prefixes = data_prefixes(args)
    refuse(
        f"--mock-data does not go with the data {', '.join(prefixes)}: leave out one of them",
        when=args.mock_data and prefixes,
    )
    refuse(
        "no data: give --data-path PREFIX, or --mock-data to try things",
        when=not (args.mock_data or prefixes),
    )
    refuse(
        "--tokenizer-type is missing: name the one that made the data", when=not args.tokenizer_type
    )
    for prefix in prefixes:
        data = open_data(prefix)
        if args.split is not None:
            check_split(args.split, prefix, len(data))
    if args.multiple_validation_sets:
        # After the training Megatron would take batches of a test set for sets.
        refuse(
            "--multiple-validation-sets needs --full-validation, --valid-data-path with the sets,"
            " and no --test-data-path",
            when=not args.full_validation or len(blends := _blends(args)) == 1 or blends[2],
        )
        names, sets = args.validation_set_names, len(blends[1][0])
        refuse(
            f"{as_flag('validation_set_names', names)}: the {sets} sets need a name each",
            when=names and not len(names) == len({*names}) == sets,
        )


def _blends(args: argparse.Namespace) -> list[Any]:
    """Paths and weights of all datasets: one blend that is split, or one of each split."""
    from megatron.training.utils import get_blend_and_blend_per_split

    with in_one_line("--data-path, --data-args-path, --per-split-data-args-path"):
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    blends = blend_per_split or [blend]
    for prefixes, weights in filter(None, blends):
        for prefix, weight in zip(prefixes, weights or [1] * len(prefixes), strict=True):
            refuse(
                f"--data-path {weight:g} {prefix}: the weight must be positive and finite: correct"
                " it, or leave out both",
                when=not 0 < weight < math.inf,
            )
    return blends


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """The paths of all datasets of the run, without their suffixes."""
    blends = [one for one in _blends(args) if one]
    return list(dict.fromkeys(prefix for prefixes, _ in blends for prefix in prefixes))


def open_data(prefix: str) -> Any:
    """Megatron's dataset of PREFIX.idx and PREFIX.bin, both of which are there and whole."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with in_one_line(f"the data {prefix} cannot be read"):
        data = IndexedDataset(prefix, mmap=True)
    size = Path(f"{prefix}.bin").stat().st_size
    promised = int(data.sequence_lengths.sum(dtype=np.int64)) * np.dtype(data.index.dtype).itemsize
    refuse(
        f"{prefix}.bin has {size} bytes where its index promises {promised}: write the data again",
        when=size != promised,
    )
    return data


def load_tokenizer(build: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """A tokenizer of Megatron's, or a line that says what is wrong with its flags or files."""
    kind, package = args.tokenizer_type, _PACKAGES.get(args.tokenizer_type)
    refuse(
        f"--tokenizer-type {kind} is not for text: use another, such as HuggingFaceTokenizer",
        when=kind in ("SFTTokenizer", "MultimodalTokenizer", "NullMultimodalTokenizer"),
    )
    refuse(
        f"--tokenizer-type {kind} needs the package {package}: pip install {package}",
        when=package and not find_spec(package),
    )
    source = args.tokenizer_model or args.vocab_file
    is_text, flag = kind != "NullTokenizer", "--tokenizer-model, or --vocab-file"
    refuse(
        f"--tokenizer-type {kind} needs {flag if is_text else '--vocab-size'}",
        when=not (source if is_text else args.vocab_size),
    )
    # Each library has exceptions of its own.
    with errors.in_one_line(ConfigurationError, f"cannot load {kind} from {source}", Exception):
        tokenizer = build(args)
        if args.vocab_file and args.vocab_file.endswith(".json"):
            # Hugging Face prefers files of its own, without a word, also for GPT2BPETokenizer.
            words = json.loads(Path(args.vocab_file).read_text(encoding="utf-8"))
            is_used = all(tokenizer.inv_vocab.get(id) == word for word, id in words.items())
            assert is_used, "--vocab-file is not used: give a HuggingFaceTokenizer's folder instead"
    return tokenizer


def has_end_token(tokenizer: Any) -> bool:
    """Whether a tokenizer of Megatron's has a token for the end of a document."""
    return tokenizer.eod is not None and 0 <= tokenizer.eod < tokenizer.vocab_size


def identity_of(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer of Megatron's does, wherever and in which files it is."""
    facts = [tokenizer.vocab_size, tokenizer.eod]
    with suppress(Exception):  # of those that know numbers only, or not all characters
        facts.append(sorted(tokenizer.inv_vocab.items()))
        facts.append(list(tokenizer.tokenize(_SAMPLE)))
    return hashlib.sha256(ascii(facts).encode()).hexdigest()


def check_split(split: str, prefix: str, sequences: int) -> None:
    """Megatron never returns from a part of the data with weight and without sequences.

    It adds epochs until there are enough tokens (core/datasets/gpt_dataset.py:694).
    """
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for part, bound in zip(("training", "validation", "test"), bounds, strict=True):
        refuse(
            f"--split {split} gives the {part} set none of the {sequences} documents of {prefix}: "
            "give it weight 0 or more weight",
            when=bound and round(bound[0] * sequences) == round(bound[1] * sequences),
        )


def check_tokenizer(args: argparse.Namespace, tokenizer: Any) -> None:
    """The tokenizer is the one that made the data: PREFIX.json names it, and all tokens are its.

    `megatron-dion data` writes PREFIX.json. Of the tokens, the first 2^27 of each dataset are
    looked at: tensor-parallel embeddings take one that is too large for a vector of zeros.
    Checkpoints keep what identifies the tokenizer.
    """
    identity, vocabulary = identity_of(tokenizer), tokenizer.vocab_size
    args.tokenizer_sha256 = identity
    if args.mock_data or args.rank != 0:  # one rank reads for all
        return
    names = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
    flags = [as_flag(name, True) for name in names if getattr(args, name)]
    flag = f"--tokenizer-type {args.tokenizer_type}"
    refuse(
        f"{', '.join(flags)}: {flag} {args.tokenizer_model} has no end token, leave it out",
        when=flags and not has_end_token(tokenizer),
    )
    for prefix in data_prefixes(args):
        notes = Path(f"{prefix}.json")
        with in_one_line(f"{notes} does not describe the data"):
            noted = json.loads(notes.read_text()) if notes.is_file() else {}
            assert isinstance(noted, dict), "it is no JSON object"
        refuse(
            f"{flag} --tokenizer-model {args.tokenizer_model} is not the tokenizer that made the "
            f"data {prefix}, see {notes}: use that one, or make the data again",
            when=noted.get("tokenizer", identity) != identity,
        )
        tokens = np.memmap(f"{prefix}.bin", dtype=open_data(prefix).index.dtype, mode="r")
        largest = int(tokens[:_TOKENS_CHECKED].max())
        refuse(
            f"the data {prefix} hold the token {largest}, and the vocabulary of {flag} has only "
            f"{vocabulary}: use the tokenizer that made the data",
            when=largest >= vocabulary,
        )
