"""Batches, loss and datasets of GPT pretraining, for every parallelism that Megatron has."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_dion.megatron.recorder import LOSS_NAME

# Settings of a dataset that are arguments of the same name.
_DATASET_ARGUMENTS = (
    *("split", "multiple_validation_sets", "full_validation", "num_dataset_builder_threads"),
    *("mmap_bin_files", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("object_storage_cache_path", "mid_level_dataset_surplus", "allow_ambiguous_pad_tokens"),
)


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
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        **{name: getattr(args, name) for name in _DATASET_ARGUMENTS},
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    reads = partial(_reads_data, vp_stage)
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads, config).build()


# Megatron then calls the provider on every rank, and the builder decides which ranks read.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]
