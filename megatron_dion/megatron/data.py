"""Batches, loss and datasets of GPT pretraining, for every parallelism that Megatron has."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_dion.megatron.recorder import LOSS_NAME

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

# Settings of a dataset that are arguments of the same name.
_DATASET_ARGUMENTS = (
    *("split", "multiple_validation_sets", "full_validation", "num_dataset_builder_threads"),
    *("mmap_bin_files", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("object_storage_cache_path", "mid_level_dataset_surplus", "allow_ambiguous_pad_tokens"),
)

# None for what a pipeline stage does not need.
Batch = dict[str, Any]


def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Any, Any]:
    """Run one microbatch through the model's part on this rank.

    Returns:
        The output of this pipeline stage (on the last one: losses per token), and the function that
        makes the loss of it.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    output = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_of_microbatch, batch["loss_mask"])


def get_batch(data_iterator: Iterator[Any], vp_stage: int | None) -> Batch:
    """Fetch this rank's part of the next microbatch; all None on stages that need none."""
    args = get_args()
    if not _stage_needs_data(args, vp_stage):
        return dict.fromkeys(_BATCH_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    data = next(data_iterator) if tp_rank == 0 else {}
    batch = get_batch_on_this_tp_rank(
        {key: data[key].cuda(non_blocking=True) if key in data else None for key in _BATCH_KEYS},
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_stage_predicts_several_tokens(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def _stage_needs_data(args: argparse.Namespace, vp_stage: int | None) -> bool:
    is_at_an_end = is_first_or_last_pipeline_stage(vp_stage)
    return is_at_an_end or _stage_predicts_several_tokens(args, vp_stage)


def _stage_predicts_several_tokens(args: argparse.Namespace, vp_stage: int | None) -> bool:
    layers = args.mtp_num_layers
    return mtp_on_this_rank(mtp_num_layers=layers, ignore_virtual=False, vp_stage=vp_stage)


def loss_of_microbatch(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses of the tokens that count.

    Args:
        loss_mask: (b, s), one where a token counts.
        output: (b, s), losses per token.

    Returns:
        The sum, the number of tokens, and both together under the name by which they are logged.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"{name} in the loss of a microbatch",
                tolerance=0.0,
                fatal=True,
            )
    return loss, tokens, {LOSS_NAME: torch.stack([loss.detach(), tokens.float()])}


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the training, validation and test set on the ranks that read them.

    Args:
        num_samples: How many samples of each set the run will ask for.
        vp_stage: The virtual pipeline stage whose data iterators are being built.
    """
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

    def reads() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and _stage_needs_data(args, vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads, config).build()


# Megatron then calls the provider on every rank, and the builder decides which ranks read.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]
