"""The command line: Megatron's, and what this project adds to it."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_dion.algorithm import (
    DTYPES,
    ORTHONORMALIZERS,
    PRECISIONS,
    RIGHT_FACTORS,
    SCALE_MODES,
    DionConfig,
)
from megatron_dion.megatron.errors import ConfigurationError
from megatron_dion.misspelt import with_suggestion
from megatron_dion.optimizer.rules import SPLITS, RoutingRules
from megatron_dion.platforms import DEVICES

SCALAR_OPTIMIZERS = ("adam", "lion")

_FUSION = "its fused kernels exist only for CUDA"

Defaults = dict[str, tuple[Any, str]]

# What Megatron has to be told on CPU: destination, value and why.
CPU_DEFAULTS: Defaults = {
    "distributed_backend": ("gloo", "the default, nccl, moves CUDA memory only"),
    "transformer_impl": ("local", "the default, Transformer Engine, needs CUDA"),
    "gradient_accumulation_fusion": (False, _FUSION),
    "no_persist_layer_norm": (True, _FUSION),
    "masked_softmax_fusion": (False, _FUSION),
    "bias_gelu_fusion": (False, _FUSION),
    "bias_swiglu_fusion": (False, _FUSION),
    "bias_dropout_fusion": (False, _FUSION),
    "apply_rope_fusion": (False, _FUSION),
    "use_cpu_initialization": (True, "weights then do not depend on the tensor-parallel size"),
    "async_strategy": ("mcore", "the default needs nvidia-resiliency-ext, which needs CUDA"),
    "num_workers": (0, "worker processes compete with the training for the same cores"),
}

_ENGINE = "it comes with Transformer Engine or apex"

# The same for a CUDA machine that has no Transformer Engine.
PLAIN_TORCH_DEFAULTS: Defaults = {
    "transformer_impl": ("local", "the default needs Transformer Engine"),
    "gradient_accumulation_fusion": (False, _ENGINE),
    "no_persist_layer_norm": (True, _ENGINE),
    "masked_softmax_fusion": (False, _ENGINE),
    "apply_rope_fusion": (False, _ENGINE),
}

# What the flags of Dion are when nobody sets them.
DION_DEFAULTS: dict[str, Any] = {
    **{f"dion_{name}": v for name, v in dataclasses.asdict(DionConfig()).items() if name != "seed"},
    "dion_split": ["qkv", "gate"],
    "dion_include": [],
    "dion_exclude": [],
    "dion_scalar_optimizer": "adam",
    "dion_scalar_lr_mult": 1.0,
    "dion_compressed_sync": False,
    "dion_recenter_interval": None,
    "dion_print_plan": False,
    "dion_log_interval": None,
    "dion_reinit_factors": False,
}

ArgsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def extra_args_provider(device: str) -> ArgsProvider:
    """Make the function that megatron.training calls with its parser.

    Args:
        device: `cuda` or `cpu`; on CPU, defaults change that have no meaning there.
    """

    def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        _raise_instead_of_printing_usage(parser)
        _offer_dion(parser)
        _add_dion_arguments(parser)
        _add_run_arguments(parser)
        _repair_help(parser)
        _set_defaults(parser, platform_defaults(device))
        return parser

    return extend


def default_arguments(device: str) -> dict[str, Any]:
    """What each argument is when nobody sets it, before Megatron derives others from it."""
    # Only now: importing it needs a platform, and the rest of this module none.
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return vars(extra_args_provider(device)(parser).parse_args([]))


def platform_defaults(device: str) -> Defaults:
    """What has to be different from Megatron's defaults on this machine."""
    if device == "cpu":
        return CPU_DEFAULTS
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    return {} if has_engine else PLAIN_TORCH_DEFAULTS


def dion_config_from_args(args: argparse.Namespace) -> DionConfig:
    """Read the hyperparameters of Dion out of the parsed command line.

    Raises:
        ConfigurationError: One of them is out of its range.
    """
    names = [field.name for field in dataclasses.fields(DionConfig) if field.name != "seed"]
    values = {name: getattr(args, f"dion_{name}") for name in names}
    try:
        return DionConfig(seed=args.seed, **values)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ConfigurationError(f"--dion-{name.replace('_', '-')} {rest}") from error


def routing_rules_from_args(args: argparse.Namespace) -> RoutingRules:
    """Read which parameters go to Dion, and as which matrices."""
    return RoutingRules(
        split=frozenset(args.dion_split),
        include=tuple(args.dion_include),
        exclude=tuple(args.dion_exclude),
    )


def describe_defaults(args: argparse.Namespace) -> str | None:
    """One line that says which arguments the platform filled in, or None if none.

    Args:
        args: The parsed command line, with the device in it.
    """
    in_effect = [
        f"{name}={value}"
        for name, (value, _) in platform_defaults(args.device).items()
        if getattr(args, name) == value
    ]
    platform = "CPU" if args.device == "cpu" else "CUDA without Transformer Engine"
    return f"defaults for {platform}: {', '.join(in_effect)}" if in_effect else None


def describe_processes(args: argparse.Namespace) -> str:
    """One line that says how many processes train, on what, and what they are divided into.

    Args:
        args: The validated command line, with the device in it.
    """
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "DP": args.data_parallel_size,
    }
    division = " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    if args.expert_model_parallel_size > 1:  # of the same ranks
        division += f", experts over {args.expert_model_parallel_size}"
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    device = "CPU (no GPU is used)" if args.device == "cpu" else "CUDA"
    return f"{processes} on {device}" + (f": {division}" if division else "")


def _raise_instead_of_printing_usage(parser: argparse.ArgumentParser) -> None:
    """Megatron's usage is hundreds of lines, and every process would print them."""

    def error(message: str) -> NoReturn:
        raise ConfigurationError(f"{with_suggestion(message, parser)} (see --help)")

    setattr(parser, "error", error)  # noqa: B010  (mypy refuses an assignment to a method)


def _offer_dion(parser: argparse.ArgumentParser) -> None:
    action = _action(parser, "--optimizer")
    if not isinstance(action.choices, list) or "adam" not in action.choices:
        raise ConfigurationError(
            "this megatron-core declares --optimizer differently from the tested version, "
            f"with choices {action.choices!r}: 'dion' cannot be added to them"
        )
    if "dion" not in action.choices:
        action.choices.append("dion")


def _action(parser: argparse.ArgumentParser, flag: str) -> argparse.Action:
    for action in parser._actions:
        if flag in action.option_strings:
            return action
    raise ConfigurationError(f"this megatron-core has no {flag}: it is not the tested version")


def _add_dion_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = DionConfig()
    group = parser.add_argument_group("dion", "with --optimizer dion")
    group.add_argument(
        "--dion-rank-fraction",
        type=float,
        default=defaults.rank_fraction,
        help="rank of an update as a share of the smaller side of the matrix, in (0, 1]",
    )
    group.add_argument(
        "--dion-rank-multiple-of",
        type=int,
        default=defaults.rank_multiple_of,
        help="round ranks up to a multiple of this",
    )
    group.add_argument(
        "--dion-momentum",
        type=float,
        default=defaults.momentum,
        help="coefficient of the error feedback, in [0, 1)",
    )
    group.add_argument(
        "--dion-scale-mode",
        choices=SCALE_MODES,
        default=defaults.scale_mode,
        help="how the size of an update depends on the shape of the matrix",
    )
    group.add_argument(
        "--dion-extra-scale-factor",
        type=float,
        default=defaults.extra_scale_factor,
        help="multiplies every update",
    )
    group.add_argument(
        "--dion-orthonormalizer",
        choices=ORTHONORMALIZERS,
        default=defaults.orthonormalizer,
        help="randomized Cholesky QR, Cholesky QR, or Householder QR; auto is the fastest for P",
    )
    group.add_argument(
        "--dion-oversample",
        type=float,
        default=defaults.oversample,
        help="rows of the random sketch per column, at least 1 (auto, rcqr)",
    )
    group.add_argument(
        "--dion-eps",
        type=float,
        default=defaults.eps,
        help="added to column norms before dividing by them",
    )
    group.add_argument(
        "--dion-right-factor",
        choices=RIGHT_FACTORS,
        default=defaults.right_factor,
        help="normalize the columns of the right factor, as the paper does, or orthonormalize them",
    )
    group.add_argument(
        "--dion-fp32-matmul-prec",
        choices=PRECISIONS,
        default=defaults.fp32_matmul_prec,
        help="of products with factors: highest is fp32, high allows TF32, medium is bf16",
    )
    for name, what in (
        ("momentum", "momentum is stored"),
        ("factor", "right factors are stored"),
        ("comm", "factors travel between ranks"),
    ):
        group.add_argument(
            f"--dion-{name}-dtype",
            choices=DTYPES,
            default=getattr(defaults, f"{name}_dtype"),
            help=f"in which {what}",
        )
    group.add_argument(
        "--dion-exchange-buffer-mib",
        type=float,
        default=defaults.exchange_buffer_mib,
        metavar="MIB",
        help="MiB that the buffers of the exchange take at most on a rank, by stepping the weights"
        " in more sets; by default there are two sets, however large",
    )
    group.add_argument(
        "--dion-split",
        type=_split,
        default=DION_DEFAULTS["dion_split"],
        metavar=f"{','.join(SPLITS)}|none",
        help="fused weights whose matrices are updated one by one (heads: each attention head)",
    )
    group.add_argument(
        "--dion-include",
        nargs="+",
        default=DION_DEFAULTS["dion_include"],
        metavar="PATTERN",
        help="2-D parameters that Dion updates in any case, by name as in routing.tsv; * matches",
    )
    group.add_argument(
        "--dion-exclude",
        nargs="+",
        default=DION_DEFAULTS["dion_exclude"],
        metavar="PATTERN",
        help="parameters that the scalar optimizer updates in any case",
    )
    group.add_argument(
        "--dion-scalar-optimizer",
        choices=SCALAR_OPTIMIZERS,
        default=DION_DEFAULTS["dion_scalar_optimizer"],
        help="optimizer of the parameters that are not matrices of linear layers",
    )
    group.add_argument(
        "--dion-scalar-lr-mult",
        type=float,
        default=DION_DEFAULTS["dion_scalar_lr_mult"],
        help="multiplies the learning rate of the scalar optimizer",
    )
    group.add_argument(
        "--dion-compressed-sync",
        action="store_true",
        help="average low-rank factors in place of gradients over the distributed-optimizer"
        " instances (--num-distributed-optimizer-instances), where they are smaller",
    )
    group.add_argument(
        "--dion-recenter-interval",
        type=int,
        default=DION_DEFAULTS["dion_recenter_interval"],
        metavar="N",
        help="with --dion-compressed-sync, replace the instances' momenta by their mean every N"
        " iterations",
    )
    group.add_argument(
        "--dion-print-plan",
        action="store_true",
        help="print what each rank holds, sends, sums and orthonormalizes in a step",
    )
    group.add_argument(
        "--dion-log-interval",
        type=int,
        default=DION_DEFAULTS["dion_log_interval"],
        metavar="N",
        help="measure the step of every N-th iteration (captured energy, stable rank, norms), for"
        " metrics.jsonl, TensorBoard and W&B; by default none",
    )
    group.add_argument(
        "--dion-reinit-factors",
        action="store_true",
        help="load momenta, also of a checkpoint with another rank fraction, split or kind of right"
        " factor, and begin the right factors anew",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="what to train on; auto is cuda where there is a CUDA device, else cpu",
    )
    group.add_argument(
        "--run-dir",
        default=None,
        help="folder for config.json, routing.tsv, metrics.jsonl and loss.png",
    )
    group.add_argument(
        "--fp8-emulation",
        action="store_true",
        help="on CPU, compute linear layers with operands rounded to FP8, as --fp8-format and"
        " --fp8-recipe say: the numerics of FP8 training, not its speed",
    )
    group.add_argument(
        "--switch-optimizer",
        action="store_true",
        help="load a checkpoint of --optimizer adam with dion, or the reverse: master weights are"
        " kept, the optimizer's state begins anew",
    )
    group.add_argument(
        "--no-checkpoint-hashes",
        action="store_true",
        help="neither write nor compare the SHA-256 of checkpoint files",
    )


def _set_defaults(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(defaults) - known)
    if unknown:
        raise ConfigurationError(
            f"this megatron-core has no argument {', '.join(unknown)}: it is not the tested version"
        )
    parser.set_defaults(**{name: value for name, (value, _) in defaults.items()})


def _repair_help(parser: argparse.ArgumentParser) -> None:
    """Some of Megatron's help texts have a bare percent sign, on which --help breaks off."""
    formatter = parser._get_formatter()
    for action in (action for action in parser._actions if "%" in (action.help or "")):
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")


def _split(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    unknown = sorted(set(names) - set(SPLITS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{','.join(unknown)!r} is not one of {', '.join(SPLITS)}, none"
        )
    return names
