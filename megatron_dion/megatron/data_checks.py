"""What is checked of data and tokenizer before pretrain_gpt.py trains on them."""

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dion.checkpointing.hashes import hash_file
from megatron_dion.megatron.errors import ConfigurationError, in_one_line, refuse

_HOW_TO_REMAKE = "write the data again with megatron-dion data preprocess"
_SPLITS = ("training", "validation", "test")
# Of each dataset; more would delay the start of a run.
_TOKENS_CHECKED = 2**27


def check_data(args: argparse.Namespace) -> None:
    """There are data, their files are whole, and the tokenizer is the one that made them."""
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
        open_data(prefix)
        check_made_with_this_tokenizer(args, prefix)


def check_made_with_this_tokenizer(args: argparse.Namespace, prefix: str) -> None:
    """Compare the command line with what was noted beside the data when they were made."""
    notes = read_notes(prefix)
    made_with = notes.get("tokenizer_type", args.tokenizer_type)
    refuse(
        f"--tokenizer-type {args.tokenizer_type}: the data {prefix} were made with "
        f"{made_with}: use that, or make the data again",
        when=made_with != args.tokenizer_type,
    )
    noted, model = notes.get("tokenizer_model_sha256"), Path(args.tokenizer_model or "")
    refuse(
        f"--tokenizer-model {args.tokenizer_model} is not the tokenizer with which the data "
        f"{prefix} were made (its sha256 is not {noted}): use that one, or make the data again",
        when=noted and model.is_file() and hash_file(model) != noted,
    )


def check_splits(args: argparse.Namespace) -> None:
    """Megatron never returns from a part of the data with weight and without sequences.

    It adds epochs until there are enough tokens (core/datasets/gpt_dataset.py:694).
    """
    if args.mock_data or args.split is None:
        return
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    for prefix in data_prefixes(args):
        sequences = len(open_data(prefix))
        for split, bound in zip(_SPLITS, bounds, strict=True):
            refuse(
                f"--split {args.split} gives the {split} set none of the {sequences} documents "
                f"of {prefix}: give it weight 0 or more weight",
                when=bound and round(bound[0] * sequences) == round(bound[1] * sequences),
            )


def check_token_ids(args: argparse.Namespace, vocabulary: int) -> None:
    """The tokens of the data are in the vocabulary, at least the first 2^27 of each dataset.

    Tensor-parallel embeddings take any other token for a vector of zeros, without a word.

    Args:
        args: The parsed arguments.
        vocabulary: Size of the tokenizer's vocabulary.
    """
    if args.mock_data or args.rank != 0:  # one rank reads for all
        return
    for prefix in data_prefixes(args):
        tokens = np.memmap(f"{prefix}.bin", dtype=open_data(prefix).index.dtype, mode="r")
        largest = int(tokens[:_TOKENS_CHECKED].max())
        refuse(
            f"the data {prefix} hold the token {largest}, and the vocabulary of "
            f"--tokenizer-type {args.tokenizer_type} has only {vocabulary}: use the tokenizer "
            "that made the data",
            when=largest >= vocabulary,
        )


def open_data(prefix: str) -> Any:
    """Megatron's dataset of the two files PREFIX.idx and PREFIX.bin.

    Raises:
        ConfigurationError: A file is missing, is not what it should be, or was cut off.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        refuse(
            f"the data {prefix} has no file {path}: give the path without .bin or .idx, "
            f"or {_HOW_TO_REMAKE}",
            when=not path.is_file(),
        )
    try:
        data = IndexedDataset(prefix, mmap=True)
    except (AssertionError, ValueError, struct.error) as error:
        raise ConfigurationError(
            f"{prefix} is not a whole Megatron dataset ({error}): {_HOW_TO_REMAKE}"
        ) from error
    size = Path(f"{prefix}.bin").stat().st_size
    promised = int(data.sequence_lengths.sum(dtype=np.int64)) * np.dtype(data.index.dtype).itemsize
    refuse(
        f"{prefix}.bin has {size} bytes where its index promises {promised}: {_HOW_TO_REMAKE}",
        when=size != promised,
    )
    return data


def read_notes(prefix: str) -> dict[str, Any]:
    """Read PREFIX.json, in which `megatron-dion data` describes the data; else empty.

    Raises:
        ConfigurationError: The file is not a JSON object.
    """
    path = Path(f"{prefix}.json")
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} is not a JSON object: {_HOW_TO_REMAKE}") from error


def unigram_entropy(args: argparse.Namespace) -> float | None:
    """Entropy of the training tokens in nats, where they are one dataset that notes it."""
    training = [] if args.mock_data else _blends(args)[0]
    value = read_notes(training[0]).get("unigram_entropy_nats") if len(training) == 1 else None
    return None if value is None else float(value)


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """The paths of all datasets of the run, without their suffixes."""
    return list(dict.fromkeys(prefix for blend in _blends(args) for prefix in blend))


def _blends(args: argparse.Namespace) -> list[list[str]]:
    """The datasets' paths: of training first, then of what has data of its own."""
    from megatron.training.utils import get_blend_and_blend_per_split

    with in_one_line("--data-args-path, --per-split-data-args-path"):
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    return [one[0] if one else [] for one in blend_per_split or [blend]]
