"""Batches, loss and datasets of GPT pretraining, for every parallelism that Megatron has."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_dion.checkpointing.agreement import on_first_rank
from megatron_dion.checkpointing.hashes import hash_file
from megatron_dion.megatron.data_checks import data_prefixes
from megatron_dion.megatron.errors import say
from megatron_dion.megatron.recorder import LOSS_NAME

# Settings of a dataset that are arguments of the same name.
_DATASET_ARGUMENTS = (
    *("split", "multiple_validation_sets", "full_validation", "num_dataset_builder_threads"),
    *("mmap_bin_files", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("object_storage_cache_path", "mid_level_dataset_surplus", "allow_ambiguous_pad_tokens"),
)


@dataclass
class _DatasetConfig(GPTDatasetConfig):
    """A config by which Megatron finds cached indices again if they are of the same data."""

    data_sha256: dict[str, str] = field(default_factory=dict)
    """Of the index of each dataset, by prefix: lengths and order of its documents."""


class HashedGPTDataset(GPTDataset):
    """Its name is in those of cached indices."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """What is in the names of cached indices; Megatron's has the path of the data only."""
        return [*GPTDataset._key_config_attributes(), "data_sha256"]


def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Any, Any]:
    """Run one microbatch through the model's part on this rank.

    Returns what comes out (of the last pipeline stage: losses per token), and the function that
    makes the loss of it.
    """
    batch: dict[str, Any] = {}
    if _reads_data(get_attr_wrapped_model(model, "vp_stage")):
        data = next(data_iterator)
        batch = {name: data[name].cuda(non_blocking=True) for name in data}
        group = mpu.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    inputs = (batch.get(name) for name in ("tokens", "position_ids", "attention_mask"))
    mask: Any = batch.get("loss_mask")
    output = model(*inputs, labels=batch.get("labels"), loss_mask=mask)
    return output, partial(loss_of_microbatch, mask)


def _reads_data(vp_stage: int | None) -> bool:
    """Whether a pipeline stage needs batches; all of its tensor-parallel ranks read them."""
    return is_first_or_last_pipeline_stage(vp_stage) or mtp_on_this_rank(
        mtp_num_layers=get_args().mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage
    )


def loss_of_microbatch(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses (b, s) of the tokens that count, for which the mask is one.

    Returns the sum, the number of tokens, and both together by the name that is logged.
    """
    loss = torch.sum(output.float() * loss_mask)
    tokens = loss_mask.sum().detach().to(torch.int)
    return loss, tokens, {LOSS_NAME: torch.stack([loss.detach(), tokens.float()])}


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the training, validation and test set on the ranks that read them."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = _DatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        data_sha256=on_first_rank(lambda: _hash_data(args)),
        **{name: getattr(args, name) for name in _DATASET_ARGUMENTS},
    )
    kind = MockGPTDataset if args.mock_data else HashedGPTDataset
    reads = partial(_reads_data, vp_stage)
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads, config).build()


def _hash_data(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of the index of each dataset; says where there are cached indices of other data."""
    hashes = {prefix: hash_file(Path(f"{prefix}.idx")) for prefix in data_prefixes(args)}
    name = HashedGPTDataset.__name__
    for prefix, sha256 in hashes.items():
        folder = Path(args.data_cache_path or f"{prefix}/cache/{name}_indices")
        texts = (path.read_text() for path in folder.glob(f"*-{name}-*-description.txt"))
        described = [text for text in texts if json.dumps(prefix) in text]
        if described and not any(sha256 in text for text in described):
            say(f"{prefix} has changed since indices of it went into {folder}: they are built anew")
    return hashes


# Megatron then calls the provider on every rank, and the builder decides which ranks read.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]
