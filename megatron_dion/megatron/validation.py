"""What is checked before training starts: small functions, each for one kind of mistake.

Each takes the parsed arguments and raises ConfigurationError with a line that names the flag, its
value and what to do. They run before megatron's own validation, except the last two.
"""

import argparse
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from megatron_dion.megatron.arguments import DION_DEFAULTS, dion_config_from_args
from megatron_dion.megatron.errors import ConfigurationError
from megatron_dion.megatron.indexed_data import IndexedData, open_indexed_data, read_sidecar
from megatron_dion.platforms.fp8.operands import RECIPES, Recipe

Check = Callable[[argparse.Namespace], None]

# Arguments that must keep their resting value with --optimizer dion, and what to do instead.
_REFUSED_WITH_DION: dict[str, tuple[object, str]] = {
    "use_torch_fsdp2": (False, "Dion shards with --use-distributed-optimizer"),
    "use_megatron_fsdp": (False, "Dion shards with --use-distributed-optimizer"),
    "optimizer_cpu_offload": (False, "Dion's state stays on the device"),
    "fp4_param_gather": (False, "its masters and packed weights may lie on different ranks"),
    "overlap_param_gather_with_optimizer_step": (False, "use --overlap-param-gather alone"),
    "use_precision_aware_optimizer": (False, "Dion keeps fp32 master weights and state"),
    "use_mup": (False, "Dion has width scaling of its own, see --dion-scale-mode"),
    "moe_single_grouped_weight": (False, "experts must be separate parameters"),
    "moe_single_grouped_bias": (False, "experts must be separate parameters"),
    "mla_down_proj_fusion": (False, "its rows would depend on the tensor-parallel size"),
    "moe_shared_expert_glu_interleave_size": (None, "gate and up rows must not be interleaved"),
    "use_grouped_gemm_for_dense_mlp": (False, "gate and up rows must not be interleaved"),
    "tensor_parallel_num_weight_shards": (None, "its shards are not in Dion's plan"),
    "expert_tensor_parallel_num_weight_shards": (None, "its shards are not in Dion's plan"),
    "experimental_attention_variant": (None, "its projections are not split into matrices yet"),
    "freeze_all_layers": (False, "there would be nothing to train"),
    "optimizer_cuda_graph": (False, "Dion's exchange cannot be captured"),
    "inprocess_restart": (False, "let the launcher start the run again, with --load"),
    "non_persistent_ckpt_type": (None, "use --save-interval, with --async-save if it takes long"),
    "ckpt_convert_format": (None, "Dion's state has one format, torch_dist"),
}

# What --fp8-emulation leaves to Transformer Engine: its resting value, and the flag.
_NOT_EMULATED: dict[str, tuple[object, str]] = {
    "fp8_wgrad": (True, "--no-fp8-wgrad"),
    "fp8_output_proj": (False, "--fp8-output-proj"),
    "fp8_interval": (1, "--fp8-interval"),
    "te_precision_config_file": (None, "--te-precision-config-file"),
    # Megatron calls Transformer Engine to compute activations again.
    "recompute_granularity": (None, "--recompute-granularity"),
    "recompute_activations": (False, "--recompute-activations"),
    "moe_layer_recompute": (False, "--moe-layer-recompute"),
}

# What --fp8-recipe delayed alone looks at, and its resting value.
_OF_DELAYED: dict[str, object] = {
    "fp8_margin": 0,
    "fp8_amax_history_len": 1,
    "fp8_amax_compute_algo": "most_recent",
}

# Ways of reading data that this script's batches do not know; ignoring the flag would be silent.
_UNSUPPORTED_DATA: dict[str, object] = {
    "sft": False,
    "fim_data": False,
    "hybrid_context_parallel": False,
    "dataloader_inter_document_masking": False,
    "dataloader_fast_cache_load": False,
    "yaml_cfg": None,
}

_TOKENIZERS_FROM_A_FILE = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
)

# What Transformer Engine asks for where it has to unpickle its state (module/base.py:1432).
_UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"

_SPLITS = ("training", "validation", "test")


def check_dion_hyperparameters(args: argparse.Namespace) -> None:
    """Ranges of the numbers; argparse has checked the choices."""
    dion_config_from_args(args)
    if args.optimizer != "dion":
        _refuse_dion_flags(args)
    default = DION_DEFAULTS["dion_oversample"]
    if args.dion_orthonormalizer in ("cqr", "qr") and args.dion_oversample != default:
        raise ConfigurationError(
            f"--dion-oversample {args.dion_oversample} has no effect with --dion-orthonormalizer "
            f"{args.dion_orthonormalizer}: use rcqr or leave it out"
        )
    if not 0 < args.dion_scalar_lr_mult < float("inf"):
        raise ConfigurationError(
            f"--dion-scalar-lr-mult must be positive and finite, not {args.dion_scalar_lr_mult}"
        )


def _refuse_dion_flags(args: argparse.Namespace) -> None:
    for name, default in DION_DEFAULTS.items():
        if getattr(args, name) != default:
            raise ConfigurationError(
                f"{_as_flag(name, getattr(args, name))} has no effect with --optimizer "
                f"{args.optimizer}: use --optimizer dion or leave it out"
            )


def check_evaluation(args: argparse.Namespace) -> None:
    """Megatron has no default for it, and divides by it."""
    if args.eval_interval is None or args.eval_interval < 1:
        raise ConfigurationError(
            f"--eval-interval must be a number of iterations, not {args.eval_interval}: "
            "give one, and --eval-iters 0 to evaluate nothing"
        )


def check_schedule(args: argparse.Namespace) -> None:
    """What Megatron notices without a word, or after it has built the model."""
    if args.lr is None:
        raise ConfigurationError("--lr is missing: give the highest learning rate of the run")
    if args.train_iters is None and args.train_samples is None:
        raise ConfigurationError("the length of the run is missing: give --train-iters")
    iterations = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_fraction is None and iterations and args.lr_warmup_iters >= iterations:
        raise ConfigurationError(
            f"--lr-warmup-iters {args.lr_warmup_iters} leaves nothing of the {iterations} "
            "iterations of --lr-decay-iters or --train-iters: give fewer than those for"
            " --lr-warmup-iters"
        )


def check_ranks(args: argparse.Namespace) -> None:
    """The processes are whole copies of the model. Megatron names no flag."""
    model = _ranks_of_model(args)
    if args.world_size % model:
        raise ConfigurationError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} times"
            f" --pipeline-model-parallel-size {args.pipeline_model_parallel_size} times"
            f" --context-parallel-size {args.context_parallel_size} need a multiple of {model}"
            f" processes, not {args.world_size}: start so many (torchrun --nproc-per-node), or"
            " change a size"
        )


def check_heads(args: argparse.Namespace) -> None:
    """Every tensor-parallel rank has whole attention heads. Megatron names no flag."""
    heads, size = args.num_attention_heads, args.tensor_model_parallel_size
    if heads is not None and heads % size:
        raise ConfigurationError(
            f"--num-attention-heads {heads} is not a multiple of --tensor-model-parallel-size"
            f" {size}: change one of them"
        )


def _ranks_of_model(args: argparse.Namespace) -> int:
    ranks: int = (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    return ranks


def check_batches(args: argparse.Namespace) -> None:
    """Every data-parallel rank gets whole micro-batches. Megatron names no flag."""
    is_fixed = args.rampup_batch_size is None and not args.decrease_batch_size_if_needed
    if not (is_fixed and args.global_batch_size and args.micro_batch_size):
        return
    ranks = args.world_size // _ranks_of_model(args)
    if args.global_batch_size % (args.micro_batch_size * ranks):
        raise ConfigurationError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} times {ranks} data-parallel ranks: change one of them"
        )


def check_dion_surroundings(args: argparse.Namespace) -> None:
    """What Dion needs of Megatron's optimizer and what it does not go with."""
    if args.optimizer != "dion":
        return
    for name, (accepted, advice) in _REFUSED_WITH_DION.items():
        value = getattr(args, name)
        if value != accepted:
            raise ConfigurationError(
                f"--optimizer dion does not go with {_as_flag(name, value)}: {advice}"
            )
    if not args.use_distributed_optimizer:
        raise ConfigurationError(
            "--optimizer dion works on the shards of the distributed optimizer: "
            "add --use-distributed-optimizer"
        )
    if args.ckpt_format != "torch_dist":
        raise ConfigurationError(
            f"--ckpt-format {args.ckpt_format} cannot hold Dion's state: use torch_dist"
        )


def check_compressed_sync(args: argparse.Namespace) -> None:
    """It averages over instances, so there must be several."""
    if args.dion_compressed_sync and args.num_distributed_optimizer_instances < 2:
        raise ConfigurationError(
            "--dion-compressed-sync averages over the instances of the distributed optimizer, and "
            f"--num-distributed-optimizer-instances is {args.num_distributed_optimizer_instances}: "
            "give at least 2"
        )
    interval = args.dion_recenter_interval
    if interval is None:
        return
    if not args.dion_compressed_sync:
        raise ConfigurationError(
            f"--dion-recenter-interval {interval} has no effect without --dion-compressed-sync: "
            "add it or leave the interval out"
        )
    if interval < 1:
        raise ConfigurationError(
            f"--dion-recenter-interval must be a number of iterations, not {interval}: give at "
            "least 1, or leave it out to recenter only when a checkpoint is saved"
        )


def check_diagnostics(args: argparse.Namespace) -> None:
    """An interval of at least one iteration, and somewhere to write what is measured."""
    interval = args.dion_log_interval
    if interval is None:
        return
    if interval < 1:
        raise ConfigurationError(
            f"--dion-log-interval must be a number of iterations, not {interval}: give at least 1,"
            " or leave it out to measure nothing"
        )
    if not (args.run_dir or args.tensorboard_dir or args.wandb_project):
        raise ConfigurationError(
            f"--dion-log-interval {interval} has nowhere to write: add --run-dir,"
            " --tensorboard-dir or --wandb-project"
        )


def check_latent_attention(args: argparse.Namespace) -> None:
    """Megatron's plain-torch layers know multi-latent attention in part only.

    Its DotProductAttention does not take values of another width than keys; the CPU platform helps.
    With tensor parallelism, the rows of `linear_kv_down_proj` that make the rotary key get the
    gradient of one rank's heads (core/transformer/multi_latent_attention.py:739 gathers them and
    its backward pass sums nothing).
    """
    if not args.multi_latent_attention or args.transformer_impl != "local":
        return
    if args.device != "cpu":
        raise ConfigurationError(
            "--multi-latent-attention does not go with --transformer-impl local: "
            "use transformer_engine, which has to be installed"
        )
    if args.tensor_model_parallel_size > 1:
        raise ConfigurationError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} does not go with "
            "--multi-latent-attention and --transformer-impl local, which loses gradients: use 1"
        )


def check_fp8(args: argparse.Namespace) -> None:
    """FP8 that something computes, and weights in FP8 that Megatron can gather."""
    for name in ("fp8_emulation", "fp8_param_gather"):
        if getattr(args, name) and not args.fp8:
            raise ConfigurationError(
                f"{_as_flag(name, True)} has no effect without --fp8-format: add --fp8-format "
                "hybrid (or e4m3) or leave it out"
            )
    if args.fp8 and not args.fp8_emulation and args.transformer_impl == "local":
        raise ConfigurationError(
            f"--fp8-format {args.fp8} has no effect with --transformer-impl local: use "
            "transformer_engine, which has to be installed, or on CPU add --fp8-emulation"
        )
    if args.fp8 and args.fp8_recipe == "delayed" and args.first_last_layers_bf16:
        raise ConfigurationError(
            "--first-last-layers-bf16 does not go with --fp8-recipe delayed: use tensorwise, "
            "blockwise or mxfp8, or leave it out"
        )
    if args.fp8_param_gather and not (args.bf16 or args.fp16):
        raise ConfigurationError(
            "--fp8-param-gather keeps weights in FP8 that are bf16 otherwise: add --bf16"
        )
    reuses = args.reuse_grad_buf_for_mxfp8_param_ag
    is_mxfp8_weights = args.fp8_param_gather and args.fp8_recipe == "mxfp8"
    if is_mxfp8_weights and not reuses:
        raise ConfigurationError(
            "--fp8-param-gather with --fp8-recipe mxfp8 needs room to gather bf16 weights in: add "
            "--reuse-grad-buf-for-mxfp8-param-ag"
        )
    if reuses and not is_mxfp8_weights:
        raise ConfigurationError(
            "--reuse-grad-buf-for-mxfp8-param-ag is for --fp8-param-gather with --fp8-recipe mxfp8 "
            f"(it is {args.fp8_recipe}): leave it out"
        )


def check_delayed_scaling(args: argparse.Namespace) -> None:
    """Its own flags, and its scales in checkpoints."""
    if args.fp8 and args.fp8_recipe == "delayed":
        if args.fp8_amax_history_len < 1:
            raise ConfigurationError(
                f"--fp8-amax-history-len must be at least 1, not {args.fp8_amax_history_len}"
            )
        if args.load is not None and not args.fp8_emulation and _UNPICKLE not in os.environ:
            raise ConfigurationError(
                "Transformer Engine refuses to load the scales of --fp8-recipe delayed from "
                f"--load {args.load}: set {_UNPICKLE}=1 if you trust the checkpoint, or use "
                "another recipe"
            )
        return
    for name, default in _OF_DELAYED.items():
        if getattr(args, name) != default:
            recipe = args.fp8_recipe if args.fp8 else "none"
            raise ConfigurationError(
                f"{_as_flag(name, getattr(args, name))} has no effect with --fp8-recipe {recipe}: "
                "use delayed or leave it out"
            )


def check_fp8_emulation(args: argparse.Namespace) -> None:
    """What the emulation leaves to Transformer Engine, and sizes that CUDA refuses."""
    if not args.fp8_emulation:
        return
    if args.device != "cpu":
        raise ConfigurationError(
            f"--fp8-emulation does not go with --device {args.device}: Transformer Engine "
            "computes in FP8 there (--transformer-impl transformer_engine)"
        )
    if args.fp8_recipe not in RECIPES:
        raise ConfigurationError(
            f"--fp8-emulation does not know --fp8-recipe {args.fp8_recipe}: it knows "
            f"{', '.join(RECIPES)}"
        )
    for name, (accepted, flag) in _NOT_EMULATED.items():
        if getattr(args, name) != accepted:
            raise ConfigurationError(f"--fp8-emulation does not know {flag}: leave it out")
    multiple = Recipe.of(args.fp8_recipe, args.fp8).multiple
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        size = getattr(args, name) or args.micro_batch_size
        tokens = args.seq_length * size // args.context_parallel_size
        if tokens % multiple:
            raise ConfigurationError(
                f"{_as_flag(name, size)} and --seq-length {args.seq_length} make {tokens} tokens on"
                f" a rank, which is not a multiple of {multiple}: FP8 products with --fp8-recipe "
                f"{args.fp8_recipe} need one"
            )


def check_checkpoint_exists(args: argparse.Namespace) -> None:
    """Megatron starts from random weights where there is nothing to load."""
    for flag, folder in (
        ("--load", args.load),
        ("--pretrained-checkpoint", args.pretrained_checkpoint),
    ):
        if folder is None:
            continue
        tracker = Path(folder, "latest_checkpointed_iteration.txt")
        if not tracker.is_file():
            raise ConfigurationError(
                f"{flag} {folder} holds no checkpoint (no {tracker.name}): "
                f"correct the path, or leave {flag} out to start from random weights"
            )
        latest = tracker.read_text().strip()
        step = args.ckpt_step if flag == "--load" and args.ckpt_step is not None else latest
        name = f"iter_{int(step):07d}" if str(step).isdigit() else str(step)
        if not Path(folder, name).is_dir():
            raise ConfigurationError(
                f"{flag} {folder} has no folder {name}: choose one that is there with --ckpt-step"
            )


def check_checkpoint_flags(args: argparse.Namespace) -> None:
    """Flags about checkpoints that contradict each other, or do not go with how they are saved."""
    if args.no_checkpoint_hashes and args.verify_integrity:
        raise ConfigurationError(
            "--no-checkpoint-hashes contradicts --verify-integrity: leave one of them out"
        )
    if args.save is not None and args.save_interval is None:
        raise ConfigurationError(
            f"--save {args.save} needs --save-interval: give the iterations from one checkpoint to "
            "the next"
        )
    if args.enable_msc and args.ckpt_format == "torch_dist":
        raise ConfigurationError(
            "--enable-msc does not go with checkpoints that are renamed when they are complete: "
            "leave it out"
        )


def check_checkpoints_are_ours(args: argparse.Namespace) -> None:
    """In a script that is not ours, a run without Dion has Megatron's own checkpoints."""
    if args.no_checkpoint_hashes:
        raise ConfigurationError(
            f"--no-checkpoint-hashes has no effect with --optimizer {args.optimizer} in a script "
            "other than megatron-dion's: leave it out"
        )


def check_data_mode(args: argparse.Namespace) -> None:
    """Flags of other training scripts, which this one would ignore."""
    for name, accepted in _UNSUPPORTED_DATA.items():
        value = getattr(args, name)
        if value != accepted:
            raise ConfigurationError(
                f"{_as_flag(name, value)} is not supported by pretrain_gpt.py: leave it out"
            )


def check_packages(args: argparse.Namespace) -> None:
    """Optional packages that would otherwise be missed hours into the run."""
    scalar = args.dion_scalar_optimizer if args.optimizer == "dion" else args.optimizer
    emerging = scalar not in ("adam", "sgd")
    for flag, needed, package in (
        ("--run-dir", args.run_dir is not None, "matplotlib"),
        ("--save", args.save is not None and args.ckpt_format == "torch_dist", "psutil"),
        ("--tensorboard-dir", args.tensorboard_dir is not None, "tensorboard"),
        (f"the optimizer {scalar}", emerging, "emerging_optimizers"),
    ):
        if needed and importlib.util.find_spec(package) is None:
            raise ConfigurationError(
                f"{flag} needs the package {package}: pip install {package.replace('_', '-')}"
            )


def check_tokenizer(args: argparse.Namespace) -> None:
    """The tokenizer is named, and its model is a file."""
    if args.tokenizer_type is None:
        raise ConfigurationError(
            "--tokenizer-type is missing: name the tokenizer that made the data, for example "
            "SentencePieceTokenizer with --tokenizer-model FILE"
        )
    if args.tokenizer_type not in _TOKENIZERS_FROM_A_FILE:
        return
    if args.tokenizer_model is None or not Path(args.tokenizer_model).is_file():
        raise ConfigurationError(
            f"--tokenizer-model {args.tokenizer_model} is not a file, which --tokenizer-type "
            f"{args.tokenizer_type} needs: give the path of the tokenizer's model"
        )


def check_data(args: argparse.Namespace) -> None:
    """There are data, their files are whole, and the tokenizer is the one that made them."""
    prefixes = data_prefixes(args)
    if args.mock_data:
        if prefixes:
            raise ConfigurationError(
                f"--mock-data does not go with the data {prefixes[0]}: leave out one of them"
            )
        return
    if not prefixes:
        raise ConfigurationError("no data: give --data-path PREFIX, or --mock-data to try things")
    for prefix in prefixes:
        open_indexed_data(prefix)
        check_made_with_this_tokenizer(args, prefix)


def check_made_with_this_tokenizer(args: argparse.Namespace, prefix: str) -> None:
    """Compare the command line with what was noted beside the data when they were made."""
    sidecar = read_sidecar(prefix)
    made_with = sidecar.get("tokenizer_type", args.tokenizer_type)
    if made_with != args.tokenizer_type:
        raise ConfigurationError(
            f"--tokenizer-type {args.tokenizer_type}: the data {prefix} were made with "
            f"{made_with}: use that, or make the data again"
        )
    noted = sidecar.get("tokenizer_model_sha256")
    if noted and args.tokenizer_model and _sha256(Path(args.tokenizer_model)) != noted:
        raise ConfigurationError(
            f"--tokenizer-model {args.tokenizer_model} is not the tokenizer with which the data "
            f"{prefix} were made (its sha256 is not {noted}): use that one, or make the data again"
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
        sequences = open_indexed_data(prefix).sequences
        for split, bound in zip(_SPLITS, bounds, strict=True):
            if bound and round(bound[0] * sequences) == round(bound[1] * sequences):
                raise ConfigurationError(
                    f"--split {args.split} gives the {split} set none of the {sequences} documents "
                    f"of {prefix}: give it weight 0 or more weight"
                )


CHECKS: tuple[Check, ...] = (
    check_dion_hyperparameters,
    check_dion_surroundings,
    check_compressed_sync,
    check_diagnostics,
    check_latent_attention,
    check_fp8,
    check_delayed_scaling,
    check_fp8_emulation,
    check_evaluation,
    check_schedule,
    check_ranks,
    check_heads,
    check_batches,
    check_checkpoint_flags,
    check_data_mode,
    check_packages,
    check_tokenizer,
    check_data,
    check_splits,
)

# Those about how pretrain_gpt.py reads its data; another script may do it in another way.
_OF_DATA: tuple[Check, ...] = (check_data_mode, check_tokenizer, check_data, check_splits)

OF_ALL_SCRIPTS = tuple(check for check in CHECKS if check not in _OF_DATA)

# Those that leave Megatron's own flags alone, for runs without Dion in a script that is not ours.
OF_OUR_FLAGS: tuple[Check, ...] = (
    check_dion_hyperparameters,
    check_compressed_sync,
    check_fp8_emulation,
    check_packages,
    check_checkpoints_are_ours,
)

# Those that look at this machine's packages and files.
OF_FILES: tuple[Check, ...] = (check_packages, check_tokenizer, check_data, check_splits)


def keep_distributed_optimizer(args: argparse.Namespace) -> None:
    """Undo what megatron's validation does to optimizers that it does not know.

    megatron/training/arguments.py:1670 turns each of them into its layer-wise optimizer and clears
    --use-distributed-optimizer, so that its later checks of that flag, repeated here, saw nothing.
    """
    args.use_layer_wise_distributed_optimizer = False
    args.use_distributed_optimizer = True
    args.dist_ckpt_optim_fully_reshardable = True
    if not args.use_gloo_process_groups and args.distrib_optim_fully_reshardable_mem_efficient:
        raise ConfigurationError(
            "--distrib-optim-fully-reshardable-mem-efficient needs gloo process groups: "
            "leave out --disable-gloo-process-groups"
        )
    if not args.ckpt_fully_parallel_save:
        raise ConfigurationError(
            "--no-ckpt-fully-parallel-save writes checkpoints that no other topology can load: "
            "leave it out with --optimizer dion"
        )


def keep_masters_of_fp8_weights(args: argparse.Namespace) -> None:
    """Master weights from the checkpoint's weights where no optimizer state is loaded.

    By default Megatron takes them from the model's (training/checkpointing.py:2613), which are
    rounded to FP8 by then. Its own flag for this is refused with --finetune.
    """
    if args.fp8_param_gather:
        args.load_main_params_from_ckpt = True


def check_token_ids(args: argparse.Namespace, vocabulary: int) -> None:
    """Every token of the data is in the vocabulary; otherwise the embedding reads beyond its end.

    Args:
        args: The parsed arguments.
        vocabulary: Size of the tokenizer's vocabulary.
    """
    # One process per run reads: the files may be large and are the same for all.
    if args.mock_data or args.rank != 0:
        return
    for data in _all_data(args):
        largest = data.largest_token()
        if largest >= vocabulary:
            raise ConfigurationError(
                f"the data {data.prefix} hold the token {largest}, and the vocabulary of "
                f"--tokenizer-type {args.tokenizer_type} has only {vocabulary}: use the tokenizer "
                "that made the data"
            )


def unigram_entropy(args: argparse.Namespace) -> float | None:
    """Entropy of the training tokens in nats, where they are one dataset that notes it."""
    prefixes = [] if args.mock_data else _blends(args)[0]
    if len(prefixes) != 1:
        return None
    value = read_sidecar(prefixes[0]).get("unigram_entropy_nats")
    return None if value is None else float(value)


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """The paths of all datasets of the run, without their suffixes."""
    return list(dict.fromkeys(prefix for blend in _blends(args) for prefix in blend))


def _blends(args: argparse.Namespace) -> list[list[str]]:
    """The datasets' paths: of training first, then of what has data of its own."""
    from megatron.training.utils import get_blend_and_blend_per_split

    for flag, path in (
        ("--data-args-path", args.data_args_path),
        ("--per-split-data-args-path", args.per_split_data_args_path),
    ):
        if path is not None and not Path(path).is_file():
            raise ConfigurationError(f"{flag} {path} is not a file: give the path of the list")
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return [one[0] if one else [] for one in blend_per_split or [blend]]


def _all_data(args: argparse.Namespace) -> list[IndexedData]:
    return [open_indexed_data(prefix) for prefix in data_prefixes(args)]


def _as_flag(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
