"""What is checked before training starts.

Each check takes the parsed arguments and raises ConfigurationError with a line that names the flag,
its value and what to do. Mistakes that Megatron itself reports are left to it.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec

from megatron_dion.megatron.data_checks import check_data
from megatron_dion.megatron.errors import refuse
from megatron_dion.megatron.flags import as_flag, given_dion_flags
from megatron_dion.optimizer.options import DionOptions

# Arguments that must not be given with --optimizer dion, and why, or what to do instead.
REFUSED_WITH_DION = {
    "use_torch_fsdp2": "Dion shards with --use-distributed-optimizer",
    "use_megatron_fsdp": "Dion shards with --use-distributed-optimizer",
    "optimizer_cpu_offload": "Dion's state stays on the device",
    "fp4_param_gather": "its masters and packed weights may lie on different ranks",
    "overlap_param_gather_with_optimizer_step": "use --overlap-param-gather alone",
    "use_precision_aware_optimizer": "Dion keeps fp32 master weights and state",
    "dump_param_to_param_group_map": "its groups are Megatron's, see routing.tsv",
    "use_mup": "Dion has width scaling of its own, see --dion-scale-mode",
    "moe_single_grouped_weight": "experts must be separate parameters",
    "moe_single_grouped_bias": "experts must be separate parameters",
    "mla_down_proj_fusion": "its rows would depend on the tensor-parallel size",
    "moe_shared_expert_glu_interleave_size": "gate and up rows must not be interleaved",
    "use_grouped_gemm_for_dense_mlp": "gate and up rows must not be interleaved",
    "tensor_parallel_num_weight_shards": "its shards are not in Dion's plan",
    "expert_tensor_parallel_num_weight_shards": "its shards are not in Dion's plan",
    "experimental_attention_variant": "its projections are not split into matrices yet",
    "freeze_all_layers": "there would be nothing to train",
    "optimizer_cuda_graph": "the host reads learning rates and the gradients' norm in each step",
    "inprocess_restart": "let the launcher start the run again, with --load",
    "non_persistent_ckpt_type": "use --save-interval, with --async-save if it takes long",
    "ckpt_convert_format": "Dion's state has one format, torch_dist",
    # MC/transformer/attention.py:2002 scales rows of master weights.
    "qk_clip": "Megatron takes a rank's piece of a master weight for the whole; use --qk-layernorm",
}

# Arguments that Megatron 0.19.2 parses and never reads, and what to do instead.
_WITHOUT_EFFECT = {
    "rampup_batch_size": "use --step-batch-size-schedule",
    "apply_residual_connection_post_layernorm": "leave it out",
}

# Ways of reading data that pretrain_gpt.py does not know, and would ignore in silence.
_UNSUPPORTED_DATA = (
    *("sft", "fim_data", "hybrid_context_parallel"),
    *("dataloader_inter_document_masking", "dataloader_fast_cache_load"),
    *("dataloader_defer_npy_index_mmap", "per_dataset_sequences_path"),
)


def check_dion_flags(args: argparse.Namespace, options: DionOptions) -> None:
    """The flags of Dion have an effect, and are there only with --optimizer dion."""
    given = [] if args.optimizer == "dion" else given_dion_flags(options)
    refuse(
        f"{', '.join(given)} has no effect with --optimizer {args.optimizer}: use --optimizer dion "
        "or leave it out",
        when=given,
    )
    refuse(
        f"--dion-recenter-interval {options.recenter_interval} needs --dion-compressed-sync",
        when=options.recenter_interval is not None and not options.compressed_sync,
    )
    refuse(
        f"--dion-log-interval {options.log_interval} has nowhere to write: add --run-dir,"
        " --tensorboard-dir or --wandb-project",
        when=options.log_interval is not None
        and not (args.run_dir or args.tensorboard_dir or args.wandb_project),
    )


def check_dion_surroundings(args: argparse.Namespace) -> None:
    """What Dion needs of Megatron's optimizer and what it does not go with."""
    if args.optimizer != "dion":
        return
    is_sharded = args.use_distributed_optimizer
    refuse("--optimizer dion needs --use-distributed-optimizer", when=not is_sharded)
    for name, advice in REFUSED_WITH_DION.items():
        value = getattr(args, name, None)  # a release may lack the flag
        flag = as_flag(name, value)
        refuse(f"--optimizer dion does not go with {flag}: {advice}", when=value)


def check_ignored(args: argparse.Namespace) -> None:
    """What Megatron would ignore, or apply to a part of a weight as if it were the whole."""
    for name, advice in _WITHOUT_EFFECT.items():
        value = getattr(args, name, None)
        refuse(f"Megatron ignores {as_flag(name, value)}: {advice}", when=value)
    refuse(
        f"--optimizer {args.optimizer} --use-distributed-optimizer does not go with --qk-clip:"
        f" {REFUSED_WITH_DION['qk_clip']}",
        when=args.qk_clip and args.use_distributed_optimizer and args.optimizer in ("adam", "sgd"),
    )


def check_muon(args: argparse.Namespace) -> None:
    """Megatron's layer-wise optimizers have no loss scale, which training reads, without bf16."""
    is_layer_wise = args.use_distributed_optimizer or args.optimizer.startswith("dist_")
    is_emerging = args.optimizer not in ("adam", "sgd", "dion")
    refuse(
        f"--optimizer {args.optimizer} with --use-distributed-optimizer or --fp16: give it --bf16",
        when=is_emerging and (is_layer_wise or args.fp16) and not args.bf16,
    )


def check_latent_attention(args: argparse.Namespace) -> None:
    """Megatron's plain-torch multi-latent attention loses gradients with tensor parallelism.

    Rows of `linear_kv_down_proj` that make the rotary key get the gradient of one rank's heads
    (core/transformer/multi_latent_attention.py:739 gathers them; its backward pass sums nothing).
    """
    is_plain = args.multi_latent_attention and args.transformer_impl == "local"
    refuse(
        "--multi-latent-attention with --transformer-impl local needs a CPU and "
        f"--tensor-model-parallel-size 1, not {args.tensor_model_parallel_size}: use "
        "transformer_engine",
        when=is_plain and (args.tensor_model_parallel_size > 1 or args.device == "cuda"),
    )


def check_fp8(args: argparse.Namespace) -> None:
    """Megatron's plain-torch layers compute nothing in FP8, without a word."""
    refuse(
        f"--fp8-format {args.fp8} has no effect with --transformer-impl local: use "
        "transformer_engine, which has to be installed",
        when=args.fp8 and args.transformer_impl == "local",
    )


def check_schedule(args: argparse.Namespace) -> None:
    """What Megatron notices after it has built the model, or divides by."""
    refuse("--lr is missing: give the highest learning rate of the run", when=args.lr is None)
    refuse("--train-iters is missing", when=args.train_iters is args.train_samples is None)
    iterations, warmup = args.lr_decay_iters or args.train_iters, args.lr_warmup_iters
    refuse(
        f"--lr-warmup-iters {warmup} leaves nothing of {iterations} iterations: give fewer",
        when=iterations and not args.lr_warmup_fraction and warmup >= iterations,
    )
    refuse(
        "--override-opt-param-scheduler takes the schedule of the command line, and"
        " --use-checkpoint-opt-param-scheduler the checkpoint's: leave one out",
        when=args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler,
    )
    refuse("--eval-interval must be at least 1 (see --eval-iters)", when=not args.eval_interval)
    for name in ("log_interval", "tensorboard_log_interval"):
        flag = as_flag(name, value := getattr(args, name))
        refuse(f"{flag}: it must be at least 1", when=value < 1)


def check_checkpoint_flags(args: argparse.Namespace) -> None:
    """What does not go with how checkpoints are saved and loaded."""
    is_never = args.save and (args.save_interval or 0) < 1
    refuse(f"--save {args.save} needs --save-interval ITERATIONS", when=is_never)
    for name, accepted in (("ckpt_format", "torch_dist"), ("enable_msc", False)):
        flag = as_flag(name, getattr(args, name))
        refuse(f"{flag} is not supported: leave it out", when=getattr(args, name) != accepted)
    refuse(
        "--no-checkpoint-hashes contradicts --verify-integrity: leave one of them out",
        when=args.no_checkpoint_hashes and args.verify_integrity,
    )


def check_hashes_of_others(args: argparse.Namespace) -> None:
    """Checkpoints of runs without Dion are Megatron's in scripts that are not ours."""
    flag = "--no-checkpoint-hashes has no effect without --optimizer dion: leave it out"
    refuse(flag, when=args.no_checkpoint_hashes)


def check_data_mode(args: argparse.Namespace) -> None:
    """Flags of other training scripts, which this one would ignore."""
    for name in _UNSUPPORTED_DATA:
        line = f"{as_flag(name, True)} is not supported by pretrain_gpt.py: leave it out"
        refuse(line, when=getattr(args, name, None))


def check_packages(args: argparse.Namespace) -> None:
    """Megatron would miss them when the first checkpoint is due, or go on without curves."""
    for flag, value, package in (
        ("--save", args.save, "psutil"),
        ("--tensorboard-dir", args.tensorboard_dir, "tensorboard"),
        ("--wandb-project", args.wandb_project, "wandb"),
    ):
        refuse(f"{flag} needs the package {package}", when=value and not find_spec(package))
    has_names = args.wandb_exp_name and (args.save or args.wandb_save_dir)
    refuse(
        "--wandb-project needs --wandb-exp-name, and --wandb-save-dir or --save",
        when=args.wandb_project and not has_names,
    )


# What holds for a run without Dion in a script that is not ours.
OF_OUR_FLAGS = (check_hashes_of_others, check_packages)

# What holds for any script that trains with Dion.
OF_ALL_SCRIPTS: tuple[Callable[[argparse.Namespace], None], ...] = (
    *(check_dion_surroundings, check_ignored, check_muon, check_latent_attention, check_fp8),
    *(check_schedule, check_checkpoint_flags, check_packages),
)

# What pretrain_gpt.py adds, since another script may read its data in another way.
OF_DATA = (check_data_mode, check_data)


def restore_distributed_optimizer(args: argparse.Namespace) -> None:
    """Undo what arguments.py:1670 makes of an optimizer that it does not know: a layer-wise one."""
    args.use_layer_wise_distributed_optimizer = False
    args.use_distributed_optimizer = True
    args.dist_ckpt_optim_fully_reshardable = True
    refuse(
        "--no-ckpt-fully-parallel-save writes checkpoints that no other topology can load: "
        "leave it out with --optimizer dion",
        when=not args.ckpt_fully_parallel_save,
    )
