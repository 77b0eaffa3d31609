"""A GPT pretraining in the manner of Megatron-LM's scripts, which knows nothing of this project.

It has flags of its own, makes the model by a config or by a provider function, and leaves the loss
of each iteration in a file, all digits of it.
"""

from functools import partial

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args, get_tokenizer, inprocess_restart, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args


def add_script_args(parser):
    group = parser.add_argument_group("script")
    group.add_argument("--losses-file")
    group.add_argument("--model-by", choices=("config", "provider"), default="config")
    group.add_argument("--loss-name", default="lm loss")
    return parser


def model_provider(
    pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None
):
    args = get_args()
    return GPTModel(
        config or core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def loss_func(loss_mask, output):
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    mean = torch.stack([loss.detach(), tokens.float()])
    note_loss(mean)
    return loss, tokens, {get_args().loss_name: mean}


def note_loss(mean):
    args = get_args()
    if args.losses_file and args.rank == 0:
        with open(args.losses_file, "a") as file:
            file.write(f"{(mean[0] / mean[1]).item()!r}\n")


def forward_step(data_iterator, model):
    batch = {name: value.cuda() for name, value in next(data_iterator).items()}
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="1,1,1",
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


if __name__ == "__main__":
    datasets_provider.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(
        extra_args_provider=add_script_args, args_defaults={"tokenizer_type": "NullTokenizer"}
    )
    model = None
    if args.model_by == "config":  # which megatron-core 0.18 does not know
        from megatron.training.argument_utils import gpt_config_from_args

        model = gpt_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets_provider,
        **({} if model else {"model_provider": model_provider}),
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        store=store,
    )
