"""What is checked of data and tokenizer before pretrain_gpt.py trains on them."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dion.checkpointing.hashes import hash_file
from megatron_dion.megatron.errors import in_one_line, refuse

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
        data = open_data(prefix)
        check_tokenizer(args, prefix)
        if args.split is not None:
            check_split(args.split, prefix, len(data))
    if args.multiple_validation_sets:
        # After the training Megatron would take batches of a test set for sets.
        refuse(
            "--multiple-validation-sets needs --full-validation, --valid-data-path with the sets,"
            " and no --test-data-path",
            when=not args.full_validation or len(blends := _blends(args)) == 1 or blends[2],
        )


def _blends(args: argparse.Namespace) -> list[Any]:
    """Paths and weights of all datasets: one blend that is split, or one of each split."""
    from megatron.training.utils import get_blend_and_blend_per_split

    with in_one_line("--data-args-path, --per-split-data-args-path"):
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    return blend_per_split or [blend]


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


def check_tokenizer(args: argparse.Namespace, prefix: str) -> None:
    """Compare the tokenizer with PREFIX.json, in which `megatron-dion data` describes the data."""
    notes = Path(f"{prefix}.json")
    if not notes.is_file():
        return
    with in_one_line(f"{notes} does not describe the data"):
        noted = json.loads(notes.read_text())
        assert isinstance(noted, dict), "it is no JSON object"
    model, hash_of_model = Path(args.tokenizer_model or ""), noted.get("tokenizer_model_sha256")
    is_other_type = noted.get("tokenizer_type", args.tokenizer_type) != args.tokenizer_type
    is_other_model = hash_of_model and model.is_file() and hash_file(model) != hash_of_model
    refuse(
        f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model} is not "
        f"the tokenizer that made the data {prefix}, see {notes}: use that one, or make the data "
        "again",
        when=is_other_type or is_other_model,
    )


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


def check_token_ids(args: argparse.Namespace, vocabulary: int) -> None:
    """The tokens of the data are less than `vocabulary`, at least the first 2^27 of each dataset.

    Tensor-parallel embeddings take any other token for a vector of zeros, without a word.
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
